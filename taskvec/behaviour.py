"""Do three models that should be the same say the same? Logits on a handful of prompts.

Compared are base + adapter (PEFT, unmerged), the merged model, and base + task vector. Weights are
taken as stored, whatever their precision, and computed with in fp32, so that what is seen is what
the merge did to the weights and not the rounding of activations. One model at a time is in memory.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.checkpoint import Checkpoint, locate_adapter
from taskvec.cli import UserError
from taskvec.conversions import Conversion, conversion_of
from taskvec.tensorfile import TensorFile, row_blocks

DEFAULT_PROMPTS = (
    "def read_config(path):\n    with open(path) as file:\n",
    "import os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "#ifndef Py_OBJECT_H\n#define Py_OBJECT_H\n#ifdef __cplusplus\nextern ",
    "/* Return the length of the list, or -1 on error. */\nPyAPI_FUNC(Py_ssize_t) PyList_Size(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
# Positions where fp32 roundings of the forward pass alone can differ stay far below this.
FP32_KL_LIMIT = 1e-4

_BLOCK_ELEMENTS = 1 << 20

# Beside the weights, an fp32 model needs activations and the loader's own buffers.
_MEMORY_FACTOR = 1.3


@dataclass(frozen=True)
class Agreement:
    """How near one model's next-token distributions are to the reference's, over all positions.

    Attributes:
        max_logit_difference: largest |difference| of two logits.
        mean_kl, max_kl: KL(reference || model) in nats.
        equal_top1: share of positions with the same most likely token.
        positions: how many.
    """

    max_logit_difference: float
    mean_kl: float
    max_kl: float
    equal_top1: float
    positions: int


def prompt_logits(model: Any, token_ids: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits (length, vocabulary) fp32 on the CPU, one tensor per prompt."""
    model.eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()
            for ids in token_ids
        ]


def agreement(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Agreement:
    """Compare two lists of logits (length, vocabulary); the statistics are taken in float64.

    A distance that is infinite or not a number, as one NaN among the weights makes it, is float64's
    largest: JSON has no word for it, and it is no agreement.
    """
    expected, found = torch.cat(list(reference)).double(), torch.cat(list(other)).double()
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    return Agreement(
        max_logit_difference=_finite(float((expected - found).abs().max())),
        mean_kl=_finite(float(kl.mean())),
        max_kl=_finite(float(kl.max())),
        equal_top1=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        positions=expected.shape[0],
    )


def _finite(distance: float) -> float:
    return distance if math.isfinite(distance) else sys.float_info.max


def obstacle(base: Checkpoint, device: torch.device) -> str | None:
    """Why the logits of this base cannot be computed, or None."""
    architectures = base.config().get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if base.directory is None or not str(name).endswith(("ForCausalLM", "LMHeadModel")):
        return f"{base.source} is not a causal language model with a config.json"
    elements = sum(info.elements for info in base.tensors.values())
    needed, available = int(4 * elements * _MEMORY_FACTOR), available_memory(device)
    if available is not None and needed > available:
        return (
            f"a whole fp32 model needs {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free"
        )
    return None


def available_memory(device: torch.device) -> int | None:
    """Free bytes on the device, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def tokenize(directory: str, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts by the base's own tokenizer; those without any are left out.

    Raises:
        UserError: the base has no tokenizer that transformers can load, or it knows no token of
            the prompts (as the empty one does that transformers makes for some models).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError):
        raise UserError(f"{directory} has no tokenizer that transformers can load") from None
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not any(ids):
        raise UserError(f"{directory} has no tokenizer that knows a token of the prompts")
    return [each for each in ids if each]


def adapter_logits(
    base: str,
    lora: str | Sequence[str],
    token_ids: Sequence[list[int]],
    device: torch.device,
) -> list[torch.Tensor]:
    """The reference: the base in fp32 with the adapters beside it, unmerged, by PEFT.

    Raises:
        UserError: transformers cannot load the base, as when it would have to run the model's code.
    """
    from peft import PeftModel

    first, *more = [
        str(locate_adapter(source)) for source in ([lora] if isinstance(lora, str) else lora)
    ]
    with _model(base, device) as model:
        adapted = PeftModel.from_pretrained(model, first, adapter_name="0")
        for number, path in enumerate(more, 1):
            adapted.load_adapter(path, str(number))
        if more:
            adapted.base_model.set_adapter([str(number) for number in range(1 + len(more))])
        return prompt_logits(adapted, token_ids)


def model_logits(
    model: str, token_ids: Sequence[list[int]], device: torch.device
) -> list[torch.Tensor]:
    """Logits of a model directory, its stored weights widened to fp32."""
    with _model(model, device) as loaded:
        return prompt_logits(loaded, token_ids)


def task_vector_logits(
    base: str, task_vector: Path, token_ids: Sequence[list[int]], device: torch.device
) -> list[torch.Tensor]:
    """Logits of base + task vector, added in fp32."""
    with _model(base, device) as model, TensorFile(task_vector) as file:
        _add_task_vector(model, file)
        return prompt_logits(model, token_ids)


@contextlib.contextmanager
def _model(source: str, device: torch.device) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, not the user's
    warnings.filterwarnings("ignore", module="peft")  # about merges, and PEFT makes none here
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"transformers cannot load {source}: {_first_line(error)}") from None
    try:
        yield model
    finally:
        del model
        gc.collect()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _add_task_vector(model: Any, file: TensorFile) -> None:
    """Add in place, row block by row block; names may be those of files, with or without prefix."""
    _untie_where_it_differs(model, file)
    state = model.state_dict()
    conversion = conversion_of(model.config.to_dict())
    added: set[tuple[int, int]] = set()
    for name, info in file.tensors.items():
        if file.is_hole(info):
            continue
        target = _target(state, conversion, name, f"{model.base_model_prefix}.")
        if target is None or target.shape != info.shape:
            raise UserError(f"{file.path}: {name} is no parameter of the model in transformers")
        place = target.data_ptr(), target.numel()
        if place in added:  # a second copy of a tied tensor
            continue
        added.add(place)
        rows = target.view(info.rows, *info.row_shape)
        for start, stop in row_blocks(info, _BLOCK_ELEMENTS):
            rows[start:stop] += file.read(info, start, stop).to(target.device)


def _untie_where_it_differs(model: Any, file: TensorFile) -> None:
    """Give the output head weights of its own where the task vector changes it in its own way."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    targets = {name: _target(state, Conversion(), name, prefix) for name in file.tensors}
    place = head.weight.data_ptr()
    shared = [name for name, at in targets.items() if at is not None and at.data_ptr() == place]
    if len(shared) == 2 and not torch.equal(*(file.read(file.tensors[name]) for name in shared)):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _target(
    state: dict[str, torch.Tensor], conversion: Conversion, name: str, prefix: str
) -> torch.Tensor | None:
    """The parameter in memory, or the part of a fused one, that a name in a file stands for."""
    key = conversion.key(name)
    candidates = (key.name, prefix + key.name, key.name.removeprefix(prefix))
    target = next((state[found] for found in candidates if found in state), None)
    if target is None or key.expert is None:
        return target
    return target[key.expert].chunk(conversion.parts(key.name))[key.part]
