"""What transformers makes of a file's names and dtypes while it loads them, by architecture.

Some architectures have other names in memory than in their files: ViT's ``encoder.layer.0`` is
``layers.0`` once loaded, and Mixtral's experts lie one by one in the file and fused in memory. An
adapter may have either kind of names, by the version of transformers that it was trained with, and
so may a checkpoint. A `Key` is what all of these are compared by.

Source of the tables: transformers 5.23, conversion_mapping.py, and _keep_in_fp32_modules of the
models; tests/test_conversions.py holds them to what transformers itself does. An architecture that
is in none of them keeps its names, and has every tensor in the dtype that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Key(NamedTuple):
    """A tensor by what it is called in memory.

    Attributes:
        name: in memory.
        expert, part: where the tensor is a piece of a fused one, whose expert it belongs to, and
            which part of that (0: gate, 1: up); None and 0 for a tensor of its own.
    """

    name: str
    expert: int | None = None
    part: int = 0


@dataclass(frozen=True)
class Experts:
    """Weights that lie one by one in a file and are stacked in memory, (expert, out, in).

    Attributes:
        modules: a regular expression for the name of the module that holds the experts.
        fused: in memory -> the parts of one expert, one below the other, as the file names them.
    """

    modules: str
    fused: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Conversion:
    """Names in a file -> names in memory.

    Attributes:
        renames: regular expressions and what their first match is replaced by, one after another.
        experts: the weights that are fused.
    """

    renames: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None

    def key(self, name: str) -> Key:
        """What a tensor is called in memory; a name that is one already stays.

        Example:
            "model.layers.0.block_sparse_moe.experts.3.w3.weight" of a Mixtral
            -> Key("model.layers.0.mlp.experts.gate_up_proj", expert=3, part=1)
        """
        for pattern, replacement in (*self.renames, *_LEGACY):
            name = re.sub(pattern, replacement, name, count=1)
        match = _EXPERT.match(name) if self.experts else None
        if self.experts and match and re.search(self.experts.modules, match["modules"]):
            for fused, parts in self.experts.fused.items():
                if match["part"] in parts:
                    part = parts.index(match["part"])
                    return Key(f"{match['modules']}.{fused}", int(match["expert"]), part)
        return Key(name)

    def parts(self, name: str) -> int:
        """How many parts one expert of a fused tensor has; 0 for one that is none."""
        modules, _, leaf = name.rpartition(".")
        if self.experts is None or not re.search(self.experts.modules, modules):
            return 0
        return len(self.experts.fused.get(leaf, ()))


_EXPERT = re.compile(r"(?P<modules>.+)\.(?P<expert>[0-9]{1,6})\.(?P<part>\w+)\.weight$")

# Of any architecture.
_LEGACY = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

_GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_W1_W3 = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_SPARSE_MOE = (r"\.block_sparse_moe\.", ".mlp.")

_MIXTRAL = Conversion((_SPARSE_MOE,), Experts(r"\.experts$", _W1_W3))
_QWEN2_MOE = Conversion(experts=Experts(r"mlp\.experts$", _GATE_UP))
_VIT = Conversion(
    (
        (r"encoder\.layer\.", "layers."),
        (r"attention\.query(?!\w)", "q_proj"),
        (r"attention\.key(?!\w)", "k_proj"),
        (r"attention\.value(?!\w)", "v_proj"),
        (r"attention\.output\.dense(?!\w)", "attention.o_proj"),
        (r"intermediate\.dense(?!\w)", "mlp.fc1"),
        (r"output\.dense(?!\w)", "mlp.fc2"),
    )
)
_DINOV2 = Conversion(
    (
        (r"attention\.attention\.query(?!\w)", "attention.q_proj"),
        (r"attention\.attention\.key(?!\w)", "attention.k_proj"),
        (r"attention\.attention\.value(?!\w)", "attention.v_proj"),
        (r"attention\.output\.dense(?!\w)", "attention.o_proj"),
    )
)
_SWIN = Conversion(
    (
        (r"attention\.self\.query(?!\w)", "attention.q_proj"),
        (r"attention\.self\.key(?!\w)", "attention.k_proj"),
        (r"attention\.self\.value(?!\w)", "attention.v_proj"),
        (
            r"attention\.self\.relative_position_bias_table",
            "attention.relative_position_bias.relative_position_bias_table",
        ),
        (r"attention\.output\.dense(?!\w)", "attention.o_proj"),
        (r"intermediate\.dense(?!\w)", "mlp.fc1"),
        (r"output\.dense(?!\w)", "mlp.fc2"),
    )
)
_LLAVA = Conversion(
    (
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "language_model"),
        (r"^language_model", "model.language_model"),
        (r"^vision_tower", "model.vision_tower"),
        (r"^(model\.vision_tower)\.vision_model\.", r"\1."),
        (r"^(multi_modal_projector|image_newline)", r"model.\1"),
    )
)
_QWEN2_VL = Conversion(
    (
        (r"^visual", "model.visual"),
        (r"^model(?!\.(language_model|visual))", "model.language_model"),
    )
)

# By model_type of config.json.
CONVERSIONS: dict[str, Conversion] = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "phimoe": Conversion(
        (_SPARSE_MOE, (r"\.gate\.weight$", ".router.weight")), Experts(r"\.experts$", _W1_W3)
    ),
    "lfm2_moe": Conversion(experts=Experts(r"feed_forward\.experts$", _W1_W3)),
    "jamba": Conversion(experts=Experts(r"feed_forward\.experts$", _GATE_UP)),
    **dict.fromkeys(
        (
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "flex_olmo",
            "deepseek_v2",
            "deepseek_v3",
            "dots1",
            "glm4_moe",
            "hunyuan_v1_moe",
        ),
        _QWEN2_MOE,
    ),
    **dict.fromkeys(("vit", "deit", "ijepa", "vivit", "audio-spectrogram-transformer"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "swin": _SWIN,
    **dict.fromkeys(("llava", "llava_next", "paligemma", "gemma3", "mistral3"), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
}


def conversion_of(config: Mapping[str, Any]) -> Conversion:
    """The conversion of a model with this config.json."""
    model_type = config.get("model_type")
    return (
        CONVERSIONS.get(model_type, Conversion()) if isinstance(model_type, str) else Conversion()
    )


# Modules that stay in fp32 in a model that is loaded in another dtype, by model_type; regular
# expressions. The first kind does only in fp16, whose range they would leave.
KEPT_FROM_FP16 = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop"), r"wo"),
    "gpt_oss": r"post_attention_layernorm|input_layernorm|norm",
}
KEPT = dict.fromkeys(("deepseek_v3", "dots1", "glm4_moe"), r"e_score_correction_bias")


def stays_in_fp32(config: Mapping[str, Any], name: str, dtype: torch.dtype) -> bool:
    """Whether a parameter is in fp32 even in a model that is loaded or stored in another dtype.

    T5's ``wo`` overflows in fp16: transformers keeps it in fp32 there, and PEFT merges it so.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or dtype not in (torch.float16, torch.bfloat16):
        return False
    patterns = [KEPT.get(model_type)]
    if dtype is torch.float16:
        patterns.append(KEPT_FROM_FP16.get(model_type))
    memory = conversion_of(config).key(name).name
    return any(pattern is not None and re.search(pattern, memory) for pattern in patterns)
