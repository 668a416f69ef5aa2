"""Documents for the tests of the figures: of real merges, and of models that are names only."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.architecture import place
from taskvec.certificate import ULP_BINS
from taskvec.kinds import TASK_VECTOR_FILE
from tests.models import make_adapter, make_base

NEGATED = "model.layers.1.self_attn.q_proj.weight"
ZEROED = "model.layers.0.self_attn.v_proj.weight"


@functools.cache
def real_documents() -> dict[str, dict[str, Any]]:
    """A small StarCoder2 merged in three precisions, and task vectors that are not its merge."""
    with tempfile.TemporaryDirectory() as directory:
        root, found = Path(directory), {}
        base = make_base(root / "base", "starcoder2")
        adapter = make_adapter(root / "adapter", base, scale=0.002)
        for precision in ("fp32", "fp16", "bf16"):
            merge(str(base), str(adapter), root / f"merged_{precision}", precision=precision)
            extract(str(base), str(root / f"merged_{precision}"), root / f"tv_{precision}")
            found[precision] = _compared(base, adapter, root / f"tv_{precision}")
        for name, change in (("negated", _negate), ("zeroed", _zero), ("nothing", _nothing)):
            wrong = root / f"tv_{name}"
            wrong.mkdir()
            with safe_open(root / "tv_fp32" / TASK_VECTOR_FILE, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                save_file(change(tensors), wrong / TASK_VECTOR_FILE, file.metadata())
            found[name] = _compared(base, adapter, wrong)
    return found


def _compared(base: Path, adapter: Path, vector: Path) -> dict[str, Any]:
    result = compare(
        str(base),
        str(adapter),
        vector.parent / f"comparison_of_{vector.name}",
        task_vector_path=vector,
        generate_plots=False,
        detailed_report=False,
    )
    return result.document


def _negate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, NEGATED: -tensors[NEGATED]}


def _zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, ZEROED: torch.zeros_like(tensors[ZEROED])}


def _nothing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def made_up(
    names: list[str],
    adapted: list[str],
    *,
    cast: bool = False,
    violated: tuple[str, ...] = (),
    cosine: float | None = 1.0,
    norm: float = 0.02,
    precision: str = "fp32",
) -> dict[str, Any]:
    """A document as `report.document` writes it, for a model that exists in names only."""
    parameters = {}
    for index, name in enumerate(names):
        where, touched = place(name), name in adapted
        size = norm * (1 + index % 7) if touched else 1e-5 * cast
        kind = "lora" if touched else "cast" if cast else "unchanged"
        parameters[name] = {
            "shape": [8, 8],
            "elements": 64,
            "stack": where.stack,
            "layer": where.layer,
            "block": where.block,
            "module": where.module,
            "attribution": "unexplained" if name in violated else kind,
            "cast_format": "fp16" if cast and not touched else None,
            "task_vector_norm": size,
            "task_vector_max_abs": size,
            "nonzero_elements": 64 if size else 0,
            "non_finite_elements": 0,
            "lora": {
                "rank": 4,
                "scaling": 1.0,
                "delta_norm": size,
                "cosine_similarity": cosine,
                "relative_error": 1e-6,
                "violations": 5 * (name in violated),
            }
            if touched
            else None,
        }
    changed = [name for name in names if parameters[name]["nonzero_elements"]]
    shared = [name for name in adapted if name in changed]
    counts = [64 * len(adapted), *[0] * ULP_BINS]
    return {
        "inputs": {},
        "summary": {
            "total_parameters": len(names),
            "nonzero_parameters": len(changed),
            "lora_parameters": len(adapted),
            "shared_parameters": len(shared),
            "min_cosine_similarity": cosine if shared else None,
            "lora_coverage": {"tensors": len(adapted) / max(len(names), 1), "elements": 0.25},
            "storage": {"adapter_bytes": 100, "dense_task_vector_bytes": 256 * len(names)},
            "relative_error": 1e-6 if shared else None,
            "perfect_matches": len(shared) if cosine == 1.0 else 0,
            "equivalent": not violated,
            "certificate": {
                "reason": "made up",
                "precision": precision,
                "elements_checked": 64 * len(adapted),
                "violations": 5 * len(violated),
                "non_finite_elements": 0,
                "max_ratio_to_bound": 7.0 if violated else 0.9,
                "violated_parameters": list(violated),
                "missing_parameters": [],
                "isolated_deviations": [],
                "unexplained_parameters": [],
                "attribution": {
                    kind: {"parameters": sum(e["attribution"] == kind for e in parameters.values())}
                    for kind in ("lora", "unchanged", "cast", "unexplained")
                },
                "ulp_histogram": {"bin_width": 0.025, "error": counts, "bound": counts[::-1]},
            },
        },
        "parameters": parameters,
    }


def _layers(prefix: str, count: int, tails: list[str]) -> list[str]:
    return [f"{prefix}.{layer}.{tail}" for layer in range(count) for tail in tails]


_T5 = ["layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"]
_EXPERTS = [f"block_sparse_moe.experts.{e}.w{w}.weight" for e in range(64) for w in (1, 2, 3)]
_LLAMA = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
]
_LONG = [f"a_module_with_a_rather_long_name_{i}.another_long_one_inside_it.weight" for i in (1, 2)]
EDGE_CASES: dict[str, dict[str, Any]] = {
    "no parameter at all": made_up([], []),
    "one parameter": made_up(["weight"], ["weight"]),
    "nothing adapted": made_up(["a.weight", "a.bias"], []),
    "a delta of zero": made_up(["h.0.a.weight"], ["h.0.a.weight"], norm=0.0, cosine=None),
    "no numbered layers": made_up([f"part{i}.weight" for i in range(50)], ["part7.weight"]),
    "encoder and decoder": made_up(
        names := _layers("encoder.block", 12, _T5) + _layers("decoder.block", 12, _T5), names[::2]
    ),
    "64 experts": made_up(names := _layers("model.layers", 3, _EXPERTS), names, cast=True),
    "126 layers, every linear module": made_up(
        names := _layers("model.layers", 126, _LLAMA),
        [name for name in names if "_proj" in name],
        cast=True,
        cosine=0.87,
        precision="bf16",
    ),
    "everything violated": made_up(
        names := _layers("model.layers", 40, _LLAMA), names, violated=tuple(names), cosine=-1.0
    ),
    "long names": made_up(
        names := _layers("prefix", 4, _LONG) + _LONG, names, violated=(names[0], names[-1])
    ),
    "mixed formats": made_up(["h.0.a.weight", "h.1.a.weight"], [], precision="mixed"),
}
