"""A base model and its tokenizer, loaded to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from taskvec.lora import linear_module_names, own_modules
from taskvec.training.options import TrainingOptions
from taskvec.training.texts import CAUSAL, Corpus, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"
# What the attention's projections are called, most common names first.
_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("query", "key", "value"), ("c_attn",))


def locate_base(base_model: str, revision: str | None) -> tuple[Path, str]:
    """The directory of a base model that is named by directory or hub id, and its identity.

    Raises:
        UserError: nothing there, damaged weights, or weights without configuration.
    """
    with open_checkpoint(base_model, revision) as base:
        if base.directory is None:
            raise UserError(f"--base_model {base_model}: has no config.json beside it")
        if not base.config():
            raise UserError(f"--base_model {base_model}: has no config.json")
        files = base.identity()["files"]
        return base.directory, " ".join(files[name]["header_sha256"] for name in sorted(files))


def is_masked(directory: Path) -> bool:
    """True for a masked language model, which also reads what comes after a token.

    Raises:
        UserError: an encoder-decoder, or a configuration that transformers does not know.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise UserError(f"{directory}: not a model that transformers knows: {error}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{directory}: {config.model_type} is an encoder-decoder; a causal or masked language "
            "model is needed"
        )
    is_decoder = getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder


def load_model(directory: Path, masked: bool, device: torch.device | str) -> PreTrainedModel:
    """The model in fp32 on ``device``.

    Raises:
        UserError: not a language model of this kind, missing tensors.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters of its warnings is an error below
    kind, auto = ("masked", AutoModelForMaskedLM) if masked else ("causal", AutoModelForCausalLM)
    try:
        model, loading = auto.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{directory}: not a {kind} language model: {error}") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{directory}: {len(missing)} missing tensors, such as {missing[0]}; a {kind} language "
            "model with its head is needed"
        )
    return model.to(device)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The base's own tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise UserError(f"{directory}: no tokenizer that loads: {error}") from None


def objective(tokenizer: PreTrainedTokenizerBase, masked: bool) -> Objective:
    """What the model learns to predict.

    Raises:
        UserError: a masked language model whose tokenizer has no mask.
    """
    from transformers import DataCollatorForLanguageModeling

    if not masked:
        return CAUSAL
    try:
        return Objective(DataCollatorForLanguageModeling(tokenizer))
    except ValueError:
        raise UserError(
            f"{tokenizer.name_or_path}: a masked language model, but its tokenizer has no mask "
            "token"
        ) from None


def pick_targets(model: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The target modules: those asked for, or the attention's projections.

    Args:
        asked: names, or ``all-linear``: every linear module but the output head.

    Raises:
        UserError: nothing was asked for, and the attention's names are not known.
    """
    if asked == (ALL_LINEAR,):
        head = model.get_output_embeddings()
        heads = {name.rpartition(".")[2] for name, module in own_modules(model) if module is head}
        return tuple(name for name in linear_module_names(model) if name not in heads)
    if asked:
        return asked
    names = linear_module_names(model)
    for projections in _ATTENTION:
        found = tuple(name for name in projections if name in names)
        if found:
            return found
    raise UserError(
        f"--target_modules: name what gets an adapter; the linear modules are {', '.join(names)}"
    )


def check_fit(model: PreTrainedModel, corpus: Corpus, training: TrainingOptions) -> None:
    """Stop where the text, the windows and the model do not go together.

    Raises:
        UserError: too little text, windows longer than the model takes, unknown token ids.
    """
    length = training.sequence_length
    windows = training.batch_size * training.gradient_accumulation_steps
    if len(corpus.training) < windows * length or len(corpus.held_out) < length:
        raise UserError(
            f"--text: too little text: {len(corpus.training)} tokens to train on and "
            f"{len(corpus.held_out)} held out; a step takes {windows} x {length}, the held-out "
            f"part at least {length}. Give more text or a smaller --sequence_length"
        )
    longest = _longest_window(model)
    if longest is not None and length > longest:
        raise UserError(f"--sequence_length {length}: the base takes at most {longest}")
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(max(corpus.training.max(), corpus.held_out.max()))
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {largest}, but the base has {vocabulary} embeddings"
        )


def _longest_window(model: PreTrainedModel) -> int | None:
    longest = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts positions from the one after its padding's.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(module.num_embeddings) - int(padding) - 1
    return longest
