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


def peft_weights(base, adapter, dtype, directory, **options):
    """What PEFT's merge saves, by the names of the files."""
    peft_merge(base, adapter, dtype, **options).save_pretrained(directory)
    return weights(directory)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_are_pefts_bit_for_bit(tiny, tmp_path, kind, precision):
    base, adapter = make_kind(tiny, kind)
    result = merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    theirs = peft_weights(base, adapter, DTYPES[precision], tmp_path / "p")
    before, mine = weights(base), weights(tmp_path / "m")
    assert_same_bits(mine, theirs)
    if precision == "fp32":
        moved = {name for name in mine if not torch.equal(before[name], theirs[name])}
        assert set(result.changed_parameters) == moved
        merge(base, adapter, tmp_path / "m", precision=precision, rounding="once")
        assert_same_bits(weights(tmp_path / "m"), theirs)


@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_names_the_recipe(tiny, tmp_path, kind, precision, rounding):
    base, adapter = make_kind(tiny, kind)
    merge(base, adapter, tmp_path / "m", precision=precision, rounding=rounding)
    found = compare(
        str(base),
        str(adapter),
        tmp_path / "c",
        finetuned_model=str(tmp_path / "m"),
        device="cpu",
        generate_plots=False,
    ).summary
    certificate = found["certificate"]
    assert certificate["verdict"] == "exact"
    assert rounding in certificate["reproduced_by"]
    assert certificate["violations"] == 0 and certificate["max_ratio_to_bound"] <= 1
    assert found["min_cosine_similarity"] > (0.9999 if precision == "fp32" else 0.9)


@pytest.mark.parametrize("kind", ["LoRA", "Conv1D", "embedding", "experts", "convolution"])
def test_deltas_are_pefts(tiny, kind):
    base, adapter = make_kind(tiny, kind)
    model = PeftModel.from_pretrained(load(base), adapter)
    theirs = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            theirs[weight.data_ptr()] = module.get_delta_weight("default").detach()
    by_place = {p.data_ptr(): name for name, p in model.named_parameters()}
    with open_checkpoint(str(base)) as opened, open_adapter(str(adapter), opened) as mine:
        updates = [mine.update(name, CPU) for name in mine.parameters]
        deltas = [update.delta(0, opened.tensors[update.parameter].rows) for update in updates]
        assert len(deltas) == len(theirs)
        for delta, update in zip(deltas, updates, strict=True):
            alike = [
                their
                for place, their in theirs.items()
                if their.shape == update.shape
                and by_place[place]
                and torch.equal(their.reshape(delta.shape), delta)
            ]
            assert len(alike) == 1
