"""Every supported kind of adapter against PEFT: the same bits, and a certificate that holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import merge_lora
from compare_lora_task_vector import compare
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from tests.adapter_kinds import KINDS, make_kind
from tests.checks import assert_same_bits, weights
from tests.models import load, peft_merge

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def merge(base, adapter, output, **options):
    return merge_lora.merge(str(base), str(adapter), output, device="cpu", **options)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_are_pefts_bit_for_bit(tiny, tmp_path, kind, precision):
    base, adapter = make_kind(tiny, kind)
    result = merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    theirs = peft_merge(base, adapter, DTYPES[precision]).state_dict()
    before = load(base).state_dict()
    mine = weights(tmp_path / "m")
    assert_same_bits(mine, theirs)
    moved = {name for name in before if not torch.equal(before[name], theirs[name].float())}
    if precision == "fp32":
        assert set(result.changed_parameters) == moved & set(mine)
