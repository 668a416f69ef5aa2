"""adapter_config.json: the scaling of each module, and every reason why an adapter is refused.

What is not understood is refused by name: nothing is merged by guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from taskvec.adapters.files import CONFIG_FILE
from taskvec.adapters.patterns import Matcher
from taskvec.adapters.targets import TargetRule
from taskvec.checkpoint import named_adapters, read_json_object
from taskvec.cli import UserError
from taskvec.kinds import ADAPTER, mistaken_directory

# Configuration keys that make something else of B @ A, and why they are refused.
_REFUSED_FLAGS = {
    "layer_replication": "layer_replication changes the architecture",
    "alora_invocation_tokens": "aLoRA is active for some tokens only, so it has no static delta",
    "use_qalora": "QA-LoRA pools the inputs, so its delta has another shape",
    "use_bdlora": "BD-LoRA is not supported",
    "arrow_config": "Arrow routes between adapters, so it has no static delta",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA takes singular values off the base, so the plain base is wrong",
}
_MERGE_IN_PEFT = (
    "merge it with PEFT's merge_and_unload(), and look at the result with extract_task_vectors.py"
)
_KEEP_BESIDE = "keep it beside the base"
# Kinds of adapters that are no LoRA: why, and what to do.
_NO_WEIGHTS = ("it adds inputs and changes no weight", _KEEP_BESIDE)
_OTHER_KINDS = {
    "XLORA": ("it mixes adapters anew for every token, so it has no static delta", _KEEP_BESIDE),
    "POLY": ("it routes between adapters, so it has no static delta", _KEEP_BESIDE),
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ),
        _NO_WEIGHTS,
    ),
}
# Of lora_alpha: what a delta's squares add up to must be a float64 number, whatever the factors.
_LARGEST_ALPHA = 1e60
# These start from chosen factors but leave the base as it is.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# What PEFT saves beside an adapter although nothing in the configuration names it
# (peft.utils.other.EMBEDDING_LAYER_NAMES).
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json of a LoRA adapter.

    Attributes:
        file: where it lies.
        values: its content.
    """

    file: Path
    values: dict[str, Any]

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.values.get("fan_in_fan_out"))

    @property
    def rounds_delta(self) -> bool:
        """PEFT rounds MiCA's delta to the base's format before it adds it."""
        return self.values.get("init_lora_weights") == "mica"

    def parameters_of(self, module: str) -> list[str]:
        """Parameters of a module that target_parameters names, as PEFT matches them.

        None of a module that target_modules selects: PEFT refuses the two on one module, so that a
        name that happens to fit, such as ``weight``, means a parameter elsewhere.
        """
        if self._targets.selects(module):
            return []
        found = []
        for target in self._names("target_parameters"):
            parameter = f"{module}.{target.rpartition('.')[2]}"
            if parameter == target or parameter.endswith(f".{target}"):
                found.append(parameter)
        return list(dict.fromkeys(found))

    def tokens(self, module: str) -> tuple[int, ...]:
        """The trainable tokens of a module's rows.

        Raises:
            UserError: trainable_token_indices does not say, or not by different numbers.
        """
        tokens = self.values.get("trainable_token_indices")
        if isinstance(tokens, dict):
            names = [name for name in tokens if module.endswith(name)]
            tokens = tokens[max(names, key=len)] if names else None
        plain = isinstance(tokens, list) and all(
            type(token) is int and 0 <= token < 2**62 for token in tokens
        )
        if not plain or not tokens or len(set(tokens)) < len(tokens):
            raise UserError(
                f"{self.file}: trainable_token_indices does not give the tokens of {module} as "
                "different whole numbers"
            )
        return tuple(tokens)

    def explains(self, parameter: str) -> bool:
        """Whether the configuration says that a whole tensor was trained, or PEFT saves it anyway.

        Args:
            parameter: as the adapter names it.
        """
        if parameter.endswith(".bias") and self.values.get("bias", "none") != "none":
            return True
        module = parameter.rpartition(".")[0]
        if module.rpartition(".")[2] in _EMBEDDINGS:
            return True
        parts = f".{module}."
        return any(f".{name}." in parts for name in self.saved_modules())

    def saved_modules(self) -> list[str]:
        """modules_to_save, as it names them."""
        return self._names("modules_to_save")

    def _names(self, key: str) -> list[str]:
        """A list of names; what is none is refused by `refusals`."""
        names = self.values.get(key)
        return names if _are_names(names) else []

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module, with rank_pattern and alpha_pattern as PEFT matches them.

        Returns:
            r and s, which is alpha / r, or alpha / sqrt(r) for rsLoRA.

        Raises:
            UserError: r is not a positive integer or alpha is not a finite number.
        """
        r = self._by_pattern("rank_pattern", module, self.values.get("r"))
        alpha = self._by_pattern("alpha_pattern", module, self.values.get("lora_alpha"))
        if type(r) is not int or not 0 < r < 2**31:
            raise UserError(f"{self.file}: r of {module} is {r!r}, not a positive integer")
        if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST_ALPHA:  # NaN neither
            raise UserError(
                f"{self.file}: lora_alpha of {module} is {alpha!r}, not a number up to "
                f"{_LARGEST_ALPHA:g}"
            )
        return r, alpha / math.sqrt(r) if self.values.get("use_rslora") else alpha / r

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.file}: {key} is {patterns!r}, not a mapping")
        for pattern, value in patterns.items():
            try:
                if self._matcher.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(f"{self.file}: {key}: {pattern!r}: {error}") from None
            except UserError as error:
                raise UserError(f"{self.file}: {key}: {error}") from None
        return default

    @cached_property
    def _targets(self) -> TargetRule:
        return TargetRule(self.values)

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher()


def load_config(path: Path) -> LoraConfig:
    """adapter_config.json as it is, of whatever kind of adapter.

    Raises:
        UserError: missing or not JSON.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        named = ", ".join(named_adapters(path))
        if not named and (what := mistaken_directory(path, ADAPTER)):
            raise UserError(f"{path}: {what}")
        raise UserError(
            f"{path}: holds no {CONFIG_FILE}, so its scaling is unknown"
            + (f"; there are adapters by name: --adapter_name {named}" if named else "")
        )
    return LoraConfig(file, read_json_object(file))


def read_config(path: Path) -> LoraConfig:
    """adapter_config.json of a LoRA adapter; anything else is refused by name.

    Raises:
        UserError: missing, not JSON, or a kind of adapter that is not understood.
    """
    config = load_config(path)
    for reason in refusals(config):
        raise UserError(f"{config.file}: {reason}")
    return config


def refusals(config: LoraConfig) -> Iterator[str]:
    """Every reason why a configuration is not that of a LoRA adapter that can be merged."""
    values = config.values
    kind = values.get("peft_type")
    if kind != "LORA":
        why, todo = "only LORA is supported", _MERGE_IN_PEFT
        if isinstance(kind, str) and kind in _OTHER_KINDS:
            why, todo = _OTHER_KINDS[kind]
        yield f"peft_type is {kind!r}: {why}; {todo}"
    for key, reason in _REFUSED_FLAGS.items():
        if values.get(key):
            yield f"{key} is set: {reason}"
    for key in ("modules_to_save", "target_parameters"):
        if values.get(key) and not _are_names(values[key]):
            yield f"{key} is {values[key]!r}, not a list of names"
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias is {values['bias']!r}, not none, all or lora_only"
    initialisation = values.get("init_lora_weights", True)
    if initialisation == "loftq":
        yield (
            "init_lora_weights is 'loftq', which changes the base itself; merge it in PEFT into "
            "the quantised base that it was trained on"
        )
    elif initialisation not in _PLAIN_INITIALISATIONS:
        yield (
            f"init_lora_weights is {initialisation!r}, which changes the base itself; "
            "save it as plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
