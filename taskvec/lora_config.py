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
from typing import Any

from taskvec.checkpoint import read_json_object
from taskvec.cli import UserError
from taskvec.patterns import Matcher

CONFIG_FILE = "adapter_config.json"

# Configuration keys that change what B @ A means, and what to do about them.
_REFUSED_FLAGS = {
    "use_dora": "DoRA adapters are not supported yet",
    "lora_bias": "lora_bias is not supported yet",
    "modules_to_save": "modules_to_save is not supported yet",
    "trainable_token_indices": "trainable tokens are not supported yet",
    "target_parameters": "target_parameters is not supported yet",
    "layer_replication": "layer_replication changes the architecture",
    "alora_invocation_tokens": "aLoRA is active for some tokens only, so it has no static delta",
    "use_qalora": "QA-LoRA pools the inputs, so its delta has another shape",
    "use_bdlora": "BD-LoRA is not supported",
    "arrow_config": "Arrow routes between adapters, so it has no static delta",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA is not supported",
}
# These start from chosen factors but leave the base as it is.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json of a plain LoRA adapter.

    Attributes:
        file: where it lies.
        values: its content.
    """

    file: Path
    values: dict[str, Any]

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.values.get("fan_in_fan_out"))

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
        if type(alpha) not in (int, float) or not abs(alpha) < 1e300:  # NaN neither
            raise UserError(f"{self.file}: lora_alpha of {module} is {alpha!r}, not a number")
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
    def _matcher(self) -> Matcher:
        return Matcher()


def load_config(path: Path) -> LoraConfig:
    """adapter_config.json as it is, of whatever kind of adapter.

    Raises:
        UserError: missing or not JSON.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{path}: holds no {CONFIG_FILE}, so its scaling is unknown")
    return LoraConfig(file, read_json_object(file))


def read_config(path: Path) -> LoraConfig:
    """adapter_config.json of a plain LoRA adapter; anything else is refused by name.

    Raises:
        UserError: missing, not JSON, or a kind of adapter that is not understood.
    """
    config = load_config(path)
    for reason in refusals(config):
        raise UserError(f"{config.file}: {reason}")
    return config


def refusals(config: LoraConfig) -> Iterator[str]:
    """Every reason why a configuration is not that of a plain LoRA adapter."""
    values = config.values
    if values.get("peft_type") != "LORA":
        yield f"peft_type is {values.get('peft_type')!r}; only LORA is supported"
    for key, reason in _REFUSED_FLAGS.items():
        if values.get(key):
            yield f"{key} is set: {reason}"
    if values.get("bias", "none") != "none":
        yield f"bias is {values['bias']!r}: trained biases are not supported yet"
    initialisation = values.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        yield (
            f"init_lora_weights is {initialisation!r}, which changes the base itself; "
            "save it as plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
