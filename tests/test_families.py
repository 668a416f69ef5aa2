"""The whole chain on a small model of every family, against transformers and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.adapters.check import inspect_adapter
from taskvec.checkpoint import open_checkpoint
from tests.checks import assert_same_bits, weights
from tests.models import ALL_FAMILIES, auto_class, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUIET: dict[str, Any] = {"generate_plots": False, "detailed_report": False, "device": "cpu"}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_merged_saved_by_peft_extracted_and_certified(tiny, tmp_path, family):
    base = tiny.base(family)
    adapter = tiny.adapter(base)
    with open_checkpoint(str(base)) as opened:
        report = inspect_adapter(str(adapter), opened)
    assert report.refusal is None
    assert not report.problems
    for precision, dtype in DTYPES.items():
        merged, theirs = tmp_path / precision, tmp_path / f"peft_{precision}"
        result = merge(
            str(base), str(adapter), merged, precision=precision, rounding="peft", device="cpu"
        )
        peft_merge(base, adapter, dtype).save_pretrained(theirs)
        assert_same_bits(weights(merged), weights(theirs))
        assert weights(merged).keys() == weights(theirs).keys()
        assert result.changed_parameters
        model, info = auto_class(family).from_pretrained(
            merged, dtype=dtype, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.dtype == dtype
        extract(str(base), str(theirs), tmp_path / "tv", device="cpu")
        ways: tuple[dict[str, Any], ...] = (
            {"finetuned_model": str(theirs)},
            {"task_vector_path": tmp_path / "tv"},
        )
        for given in ways:
            found = compare(str(base), str(adapter), tmp_path / "c", **given, **QUIET)
            assert found.summary["certificate"]["verdict"] == "exact"
            assert found.summary["shared_parameters"] == len(result.changed_parameters)
    assert set(report.touched) == set(result.changed_parameters)
