"""The behavioural check: agreement of logits, and that task vectors are really added."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from extract_task_vectors import extract
from merge_lora import merge
from taskvec import behaviour
from tests.models import make_adapter, make_base

TOKENS = [[1, 5, 9, 2, 7], [3, 3, 8]]
CPU = torch.device("cpu")


def test_agreement_by_hand() -> None:
    """Two positions, two tokens: KL, top-1 and the largest difference worked out by hand."""
    reference = [torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])]  # p = (3/4, 1/4), (1/2, 1/2)
    other = [torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])]  # q = (1/4, 3/4), (1/2, 1/2)
    found = behaviour.agreement(reference, other)
    kl = 0.75 * math.log(3.0) + 0.25 * math.log(1 / 3)
    assert found.max_kl == pytest.approx(kl, rel=1e-6)
    assert found.mean_kl == pytest.approx(kl / 2, rel=1e-6)
    assert found.max_logit_difference == pytest.approx(math.log(3.0), rel=1e-6)
    assert found.equal_top1 == 0.5
    assert found.positions == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_no_agreement(value: float) -> None:
    reference = [torch.zeros(2, 3)]
    other = [torch.tensor([[0.0, 0.0, 0.0], [0.0, value, 0.0]])]
    found = behaviour.agreement(reference, other)
    assert found.max_kl == found.mean_kl == found.max_logit_difference == sys.float_info.max
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_three_models_agree_in_fp32(tmp_path: Path, family: str) -> None:
    """Base + adapter, merged model and base + task vector give the same logits up to rounding."""
    base = str(make_base(tmp_path / "base", family))
    lora = str(make_adapter(tmp_path / "lora", Path(base), scale=0.2))
    merge(base, lora, tmp_path / "merged", device="cpu")
    extract(base, str(tmp_path / "merged"), tmp_path / "tv", device="cpu")
    reference = behaviour.adapter_logits(base, lora, TOKENS, CPU)
    merged = behaviour.model_logits(str(tmp_path / "merged"), TOKENS, CPU)
    summed = behaviour.task_vector_logits(
        base, tmp_path / "tv" / "task_vector.safetensors", TOKENS, CPU
    )
    for logits in (merged, summed):
        found = behaviour.agreement(reference, logits)
        assert found.max_logit_difference < 1e-4
        assert found.equal_top1 == 1.0
    plain = behaviour.agreement(reference, behaviour.model_logits(base, TOKENS, CPU))
    assert plain.max_logit_difference > 1e-3, "the adapter must matter, or the test shows nothing"


def test_precision_costs_more_and_more(tmp_path: Path) -> None:
    """The distance to base + adapter grows from fp32 over fp16 to bf16."""
    base = str(make_base(tmp_path / "base"))
    lora = str(make_adapter(tmp_path / "lora", Path(base), scale=0.2))
    reference = behaviour.adapter_logits(base, lora, TOKENS, CPU)
    distances = []
    for precision in ("fp32", "fp16", "bf16"):
        made = merge(base, lora, tmp_path / precision, precision=precision, device="cpu")
        logits = behaviour.model_logits(str(made.output_dir), TOKENS, CPU)
        distances.append(behaviour.agreement(reference, logits).mean_kl)
    assert distances[0] < distances[1] < distances[2]
