"""What is trained: LoRA by this project or by PEFT, or every weight."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taskvec.lora import LoraSettings, inject, matching_modules
from taskvec.lora_files import load_adapter, save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """How a model is trained and what is saved of it.

    Attributes:
        lora: the adapter's settings; None where every weight is trained.
        backend: whose LoRA: ``scratch`` is taskvec/lora.py, ``peft`` PEFT's.
        base_model, revision: what the adapter's configuration says it was trained on.
        masked: the base is a masked language model.
    """

    lora: LoraSettings | None
    backend: str | None
    base_model: str
    revision: str | None
    masked: bool

    @property
    def name(self) -> str:
        return "full" if self.lora is None else "lora"

    @property
    def task_type(self) -> str | None:
        return None if self.masked else "CAUSAL_LM"  # PEFT has no word for masked ones

    def prepare(self, model: PreTrainedModel, seed: int, checkpoint: Path | None) -> Any:
        """Make trainable what is to be trained.

        Args:
            model: the base; where every weight is trained, as the checkpoint holds it.
            seed: A is drawn from it, in the same order by both backends.
            checkpoint: a directory of `save` whose adapter goes on being trained.

        Raises:
            UserError: a target module that the base has not got.
        """
        if self.lora is None:
            return model.requires_grad_(True)
        matching_modules(model, self.lora.target_modules)  # PEFT would pass over a typo
        torch.manual_seed(seed)
        if self.backend == "peft":
            return self._peft(model, self.lora, checkpoint)
        if checkpoint is None:
            inject(model, self.lora)
        else:
            load_adapter(model, checkpoint)
        return model

    def save(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """The adapter in PEFT's format, or the model and its tokenizer as transformers does."""
        if self.lora is None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        elif self.backend == "peft":
            config = model.peft_config["default"]
            config.target_modules = sorted(config.target_modules)  # a set has no fixed order
            config.base_model_name_or_path = self.base_model  # not the directory it was read from
            model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
        else:
            save_adapter(
                model,
                folder,
                base_model=self.base_model,
                revision=self.revision,
                task_type=self.task_type,
            )

    def _peft(self, model: PreTrainedModel, lora: LoraSettings, checkpoint: Path | None) -> Any:
        from peft import LoraConfig, PeftModel, get_peft_model

        with warnings.catch_warnings():  # PEFT says here what it adapts to by itself
            warnings.simplefilter("ignore")
            if checkpoint is not None:
                return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
            config = LoraConfig(
                task_type=self.task_type, revision=self.revision, **lora.peft_values()
            )
            return get_peft_model(model, config)
