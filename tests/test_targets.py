"""Which modules a configuration selects is what PEFT makes of it."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from taskvec.adapters.targets import TargetRule

MODULES = [
    "lm_head",
    "model.embed_tokens",
    *(
        f"model.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.up_proj", "mlp.gate")
    ),
    "encoder.block.1.layer.0.SelfAttention.q",
]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head", "q"]},
        {"target_modules": ["model.layers.1.mlp.gate"]},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {
            "target_modules": ["q_proj", "q"],
            "layers_to_transform": [1],
            "layers_pattern": "block",
        },
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.2\..*"},
    ],
)
def test_target_modules_select_what_they_select_in_peft(values):
    rule = TargetRule(values)
    reference = LoraConfig(**values)
    for module in MODULES:
        assert rule.selects(module) == bool(check_target_module_exists(reference, module)), module
