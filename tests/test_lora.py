"""LoRA by the definition, held to PEFT: the same start, curve, files and merged bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from taskvec import lora
from taskvec.adapters.files import write_adapter
from taskvec.cli import UserError
from taskvec.lora import LoraSettings, inject
from taskvec.lora_files import load_adapter, save_adapter
from tests.checks import assert_same_bits, edit_json, edit_tensors, names
from tests.models import FAMILIES, TARGETS, load

TOKENS = torch.arange(96).reshape(3, 32)


def settings(family: str = "llama", **fields: Any) -> LoraSettings:
    given = {"r": 4, "alpha": 8, "target_modules": tuple(TARGETS[family]), **fields}
    return LoraSettings(**given)


def peft_model(base: Path, family: str, seed: int, **fields: Any) -> Any:
    values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], **fields}
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", **values)
    return get_peft_model(load(base), config)


def injected(base: Path, given: LoraSettings, seed: int, name: str = "default") -> Any:
    model = load(base)
    torch.manual_seed(seed)
    inject(model, given, name)
    return model


def randomise(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Give an adapter's factors values, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            if name in layer.adapters:
                for factor in layer.adapter(name).factors().values():
                    factor.normal_(0, 0.05)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def train(model: Any, steps: int) -> list[float]:
    """AdamW on windows drawn from a fixed seed; the losses."""
    torch.manual_seed(11)  # of dropout
    draw = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model), lr=5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        tokens = torch.randint(96, (2, 1), generator=draw) + torch.arange(24)
        loss = model(input_ids=tokens % 96, labels=tokens % 96).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- training, beside PEFT --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_peft_s_start(tiny: Any, family: str) -> None:
    base = tiny.base(family)
    mine = injected(base, settings(family), seed=2)
    theirs = peft_model(base, family, seed=2)
    for own, peft in zip(
        lora.trainable_parameters(mine), lora.trainable_parameters(theirs), strict=True
    ):
        assert torch.equal(own, peft)


@pytest.mark.parametrize(
    ("family", "fields", "peft_fields"),
    [
        ("llama", {}, {}),
        ("gpt2", {"dropout": 0.1}, {"lora_dropout": 0.1}),
        ("starcoder2", {"rslora": True, "dropout": 0.2}, {"use_rslora": True, "lora_dropout": 0.2}),
    ],
)
def test_loss_curve_is_peft_s_over_100_steps(
    tiny: Any, family: str, fields: dict[str, Any], peft_fields: dict[str, Any]
) -> None:
    base = tiny.base(family)
    mine = train(injected(base, settings(family, **fields), seed=2), 100)
    theirs = train(peft_model(base, family, seed=2, **peft_fields), 100)
    assert mine[-1] < mine[0] - 0.1
    assert mine == pytest.approx(theirs, abs=1e-5)


def test_only_the_factors_are_trained(llama: Path) -> None:
    model = injected(llama, settings(), seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, 2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith(("A.weight", "B.weight"))}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_an_untrained_adapter_changes_no_bit(llama: Path) -> None:
    assert torch.equal(logits(injected(llama, settings(), seed=2)), logits(load(llama)))


def test_a_layer_computes_the_definition() -> None:
    """Against numpy in float64: h = W x + b + s B A x, with s = alpha / r, or / sqrt(r)."""
    for rslora, scale in ((False, 6 / 4), (True, 6 / 4**0.5)):
        model = nn.Sequential(nn.Linear(7, 5))
        inject(model, LoraSettings(4, 6, target_modules=("0",), rslora=rslora))
        randomise(model)
        x = torch.randn(3, 7)
        state = {k: v.double().numpy() for k, v in model.state_dict().items()}
        A, B = state["0.adapters.default.A.weight"], state["0.adapters.default.B.weight"]
        W, b = state["0.base.weight"], state["0.base.bias"]
        expected = x.double().numpy() @ (W + scale * B @ A).T + b
        np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_is_saved_with_the_same_logits(
    tiny: Any, family: str, rslora: bool, tmp_path: Path
) -> None:
    base = tiny.base(family)
    model = injected(base, settings(family, rslora=rslora), seed=2)
    randomise(model)
    save_adapter(model, tmp_path, base_model="some/base", task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(load(base), tmp_path)
    assert torch.equal(logits(model), logits(theirs))
    assert not torch.equal(logits(model), logits(load(base)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"rank_pattern": {"layers.0.*": 2, "h.1.*": 3}, "alpha_pattern": {".*1.*": 5}},
        {"layers_to_transform": [1]},
    ],
)
def test_what_peft_saved_loads_with_the_same_logits(
    tiny: Any, family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny.base(family)
    adapter = tiny.adapter(base, **config)
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    mine = load(base)
    load_adapter(mine, adapter)
    assert torch.equal(logits(mine), expected)
    save_adapter(mine, tmp_path, task_type="CAUSAL_LM")
    assert_same_bits(
        load_file(tmp_path / "adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), tmp_path)), expected)


def test_what_stops_in_saving_leaves_nothing_that_looks_like_an_adapter(tmp_path: Path) -> None:
    """Not the old configuration beside new factors, nor a new one beside none."""
    good = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
    write_adapter(tmp_path, {"r": 2}, good)
    assert names(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    without_values = {**good, "a.lora_B.weight": torch.empty(3, 2, device="meta")}
    with pytest.raises(NotImplementedError):
        write_adapter(tmp_path, {"r": 4}, without_values)
    assert names(tmp_path) == ["adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_embedding_adapters_go_to_peft_and_back(llama: Path, tmp_path: Path) -> None:
    mine = injected(llama, settings(target_modules=("embed_tokens", "q_proj")), seed=2)
    randomise(mine)
    save_adapter(mine, tmp_path, task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(load(llama), tmp_path)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=0, atol=1e-6)
    again = load(llama)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(mine))
    lora.merge(mine, "default")
    lora.unload(mine)
    assert_same_bits(mine.state_dict(), theirs.merge_and_unload().state_dict())


def test_a_half_precision_adapter_is_raised_to_fp32(llama: Path, tmp_path: Path) -> None:
    save_adapter(injected(llama, settings(), seed=2), tmp_path)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(tmp_path / "adapter_model.safetensors", halve)
    model = load(llama)
    load_adapter(model, tmp_path)
    assert {p.dtype for p in lora.trainable_parameters(model)} == {torch.float32}


# ---- several adapters, merged and unmerged ----------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_peft_s_and_unmerging_restores_every_bit(
    tiny: Any, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny.base(family)
    model = load(base, dtype)
    before = copy.deepcopy(model.state_dict())
    inject(model, settings(family))
    randomise(model)
    save_adapter(model, tmp_path)
    beside = logits(model)
    for _ in range(3):
        lora.merge(model, "default")
        torch.testing.assert_close(logits(model), beside, rtol=0, atol=2e-2)
        lora.unmerge(model)
    assert torch.equal(logits(model), beside)
    lora.merge(model, "default")
    merged = copy.deepcopy(model)
    lora.unload(merged)
    theirs = PeftModel.from_pretrained(load(base, dtype), tmp_path).merge_and_unload()
    assert_same_bits(merged.state_dict(), theirs.state_dict())
    lora.unmerge(model)
    lora.unload(model)
    assert_same_bits(model.state_dict(), before)


def test_several_adapters_are_switched_merged_and_unmerged(llama: Path, tmp_path: Path) -> None:
    """Two adapters on other modules and with other ranks; PEFT holds each alone and both merged."""
    model = injected(llama, settings(target_modules=("q_proj", "v_proj")), seed=2, name="one")
    inject(model, settings(r=2, alpha=3, target_modules=("v_proj", "up_proj")), "two")
    randomise(model, "one", seed=3)
    randomise(model, "two", seed=4)
    expected: dict[str | None, torch.Tensor] = {None: logits(load(llama))}
    for name in ("one", "two"):
        save_adapter(model, tmp_path / name, name, task_type="CAUSAL_LM")
        expected[name] = logits(PeftModel.from_pretrained(load(llama), tmp_path / name))
    for active in ("two", None, "one", "two"):
        lora.set_active(model, active)
        assert torch.equal(logits(model), expected[active])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".two." in n for n in trainable)

    theirs = PeftModel.from_pretrained(load(llama), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.merge_adapter(["one", "two"])
    lora.merge(model, "one")
    lora.merge(model, "two")
    assert torch.equal(logits(model), logits(theirs))
    lora.unmerge(model)
    assert torch.equal(logits(model), expected["two"])
    lora.merge(model, "one")  # "up_proj" must not go on adding "two"
    alone = PeftModel.from_pretrained(load(llama), tmp_path / "one").merge_and_unload()
    assert torch.equal(logits(model), logits(alone))


def test_misuse_is_an_error(llama: Path) -> None:
    model = injected(llama, settings(), seed=2)
    with pytest.raises(ValueError, match="there already"):
        inject(model, settings())
    with pytest.raises(ValueError, match="no adapter 'other'; there are: default"):
        lora.set_active(model, "other")
    lora.merge(model, "default")
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model, "default")
    for call in (lambda: lora.set_active(model, None), lambda: inject(model, settings(), "more")):
        with pytest.raises(ValueError, match="unmerge first"):
            call()


# ---- what is refused --------------------------------------------------------------------------


def test_targets_that_do_not_fit(tiny: Any, llama: Path) -> None:
    for target, words in (("qkv", "no such module.*down_proj.*q_proj"), ("norm", "Llama.*Norm")):
        model = load(llama)
        with pytest.raises(UserError, match=words):
            inject(model, settings(target_modules=("q_proj", target)))
        assert not lora.lora_layers(model)
    gpt2 = load(tiny.base("gpt2"))
    with pytest.raises(UserError, match="Linear and Conv1D"):
        inject(gpt2, settings(target_modules=("c_attn", "lm_head")))


def test_files_that_do_not_fit(tiny: Any, llama: Path, tmp_path: Path, copied: Any) -> None:
    adapter = tiny.adapter(llama)
    weights = "adapter_model.safetensors"

    def refused(folder: Path, words: str) -> None:
        model = load(llama)
        with pytest.raises(UserError, match=words):
            load_adapter(model, folder)
        assert not lora.lora_layers(model)

    refused(tiny.adapter(tiny.base("gpt2")), "transformer.h.0.attn.c_attn.*has not got")
    refused(tmp_path, "adapter_config.json")
    broken = copied(adapter)
    edit_json(broken / "adapter_config.json", r=3)
    refused(broken, r"down_proj has .*\(4, 48\).*\(3, 48\)")
    edit_json(broken / "adapter_config.json", r=4)
    edit_tensors(broken / weights, lambda tensors: tensors.pop(min(tensors)))
    refused(broken, "lora_A")
    edit_tensors(broken / weights, lambda tensors: tensors.update({"x": torch.ones(1)}))
    refused(broken, "x: not a tensor of a plain LoRA")
    (broken / weights).unlink()
    refused(broken, weights)
