"""benchmarks/training_speed.py: what it times, and what it makes of it. No time is looked at."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import training_speed, training_steps
from tests.models import make_base


def test_both_loras_do_the_same_steps_with_moments_of_what_they_train(tmp_path, capsys):
    base = make_base(tmp_path / "base", "llama")
    found = []
    for backend in ("scratch", "peft"):
        flags = ["--base_model", str(base), "--backend", backend, "--steps", "3", "--quiet"]
        assert training_steps.main([*flags, "--sequence_length", "16"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    scratch, peft = found
    assert scratch["losses"] == pytest.approx(peft["losses"], rel=1e-5)
    assert len(scratch["losses"]) == 3
    assert scratch["trainable"] == peft["trainable"]
    # AdamW's two moments in fp32
    assert scratch["optimizer_bytes"] == peft["optimizer_bytes"] == 8 * scratch["trainable"]
    assert scratch["tokens_per_second"] > 0


def test_without_a_backend_every_weight_is_trained(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    found = training_steps.time_steps(str(base), None, [], 2, 2, 16)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert found["trainable"] == model.num_parameters()


def test_the_larger_base_has_the_size_of_its_name():
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(training_speed.larger_config())
    assert f"{model.num_parameters() / 1e6:.0f}M" == training_speed.LARGER


def way(name: str, losses: list[float], tokens: float = 50.0) -> dict[str, object]:
    return {
        "way": name, "trainable": 1000, "tokens_per_second": tokens, "peak": 3e8,
        "optimizer_bytes": 8000, "losses": losses,
    }  # fmt: skip


def test_losses_that_part_are_exit_status_1(monkeypatch, capsys):
    ours, full = way("ours", [5.0, 4.9]), way("full", [9.0, 9.0], 25.0)
    for theirs, status in (([5.0, 4.9001], 0), ([5.0, 4.8], 1)):
        ways = [ours, way("peft", theirs), full]
        monkeypatch.setattr(training_speed, "compare", lambda *args, ways=ways: ways)
        assert training_speed.main(["--models", "mini"]) == status
        shown = capsys.readouterr().out
        assert f"same losses: {'NO' if status else 'yes'}" in shown
        # tokens per second and peak, each over that of full fine-tuning
        row = next(line.split() for line in shown.splitlines() if line.startswith("ours"))
        assert row == ["ours", "1,000", "50", "2.00", "300", "1.00", "0.01", "1.000"]
