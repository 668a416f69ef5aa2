"""Fine-tuning every family, by every method, interrupted or not."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    Starcoder2Config,
)

import extract_task_vectors
import finetune_lora
import merge_lora
from taskvec.training.loop import Run, make_optimizer, train
from taskvec.training.options import TrainingOptions
from tests.checks import assert_same_bits, edit_json, edit_tensors, names, weights
from tests.models import save_byte_tokenizer

ROOT = Path(__file__).parent.parent
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {k: v for k, v in DECODER.items() if "key_value" not in k}
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any], set[str]]] = {
    "llama": (LlamaConfig, DECODER, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "starcoder2": (Starcoder2Config, DECODER, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {"c_attn"}),
    "bert": (BertConfig, ENCODER, {"query", "key", "value"}),
    "roberta": (RobertaConfig, {**ENCODER, "max_position_embeddings": 66}, {"query", "key"}),
}
MASKED = {"bert", "roberta"}
TEXT = "The quick brown fox jumps over the lazy dog; " * 60
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories with a random model and a tokenizer of bytes, by family."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            tokens = save_byte_tokenizer(folder, masked=family in MASKED)
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            kind, sizes, _ = FAMILIES[family]
            config = kind(vocab_size=tokens, pad_token_id=0, **ends, **sizes)
            torch.manual_seed(0)
            auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
            auto.from_config(config).save_pretrained(folder)
        return made[family]

    return base


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


def flags(base: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--base_model", str(base), "--text", str(text), "--output_dir", str(output)),
        *("--rank", "4", "--alpha", "8", "--steps", "12", "--batch_size", "4", "--quiet"),
        *("--sequence_length", "32", "--learning_rate", "0.01", "--device", "cpu", *more),
    ]


def log_of(folder: Path) -> Any:
    return json.loads((folder / "training_log.json").read_text())


# ---- families and methods ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_by_lora_and_fully(
    bases: Any, text: Path, tmp_path: Path, family: str
) -> None:
    base = bases(family)
    for method, more, least in (("lora", ("--learning_rate", "0.05"), 0.1), ("full", (), 0.5)):
        folder = tmp_path / method
        argv = flags(base, text, folder, "--method", method, "--steps", "30", *more)
        assert finetune_lora.main(argv) == 0
        loss = log_of(folder)["loss"]
        assert loss["after"] < loss["before"] - least, method
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    tuned = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "lora")
    assert set(tuned.peft_config["default"].target_modules) >= FAMILIES[family][2]
    whole, loading = auto.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(loading.values()), loading
    assert whole.num_parameters() == log_of(tmp_path / "full")["parameters"]["trainable"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [(), ("--rslora", "--dropout", "0.2")], ids=["plain", "rslora"])
def test_both_backends_write_the_same_tensors(
    bases: Any, text: Path, tmp_path: Path, family: str, more: tuple[str, ...]
) -> None:
    """Same initial factors, batches and optimiser: PEFT's training, bit for bit."""
    saved = {}
    for backend in ("scratch", "peft"):
        argv = flags(bases(family), text, tmp_path / backend, "--backend", backend, *more)
        assert finetune_lora.main(argv) == 0
        saved[backend] = load_file(tmp_path / backend / "adapter_model.safetensors")
    assert_same_bits(saved["scratch"], saved["peft"])
    assert saved["scratch"].keys() == saved["peft"].keys()
    logs = [log_of(tmp_path / backend)["history"] for backend in saved]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("family", ["starcoder2", "gpt2", "bert"])
def test_a_trained_adapter_merges_and_its_task_vector_is_extracted(
    bases: Any, text: Path, tmp_path: Path, family: str
) -> None:
    base, adapter, merged = bases(family), tmp_path / "adapter", tmp_path / "merged"
    assert finetune_lora.main(flags(base, text, adapter)) == 0
    argv = ["--base_model", str(base), "--device", "cpu", "--quiet"]
    lora = ["--lora_path", str(adapter), "--output_dir", str(merged)]
    assert merge_lora.main([*argv, *lora]) == 0
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    theirs = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).merge_and_unload()
    mine = auto.from_pretrained(merged)
    assert_same_bits(mine.state_dict(), theirs.state_dict())


def test_a_fully_trained_model_has_a_task_vector(bases: Any, text: Path, tmp_path: Path) -> None:
    base, tuned, vector = bases("starcoder2"), tmp_path / "tuned", tmp_path / "vector"
    assert finetune_lora.main(flags(base, text, tuned, "--method", "full", "--steps", "2")) == 0
    argv = ["--base_model", str(base), "--finetuned_model", str(tuned), "--device", "cpu"]
    assert extract_task_vectors.main([*argv, "--output_dir", str(vector), "--quiet"]) == 0
    before, after, task = weights(base), weights(tuned), weights(vector)
    assert task.keys() == before.keys() == after.keys()
    for name, difference in task.items():
        assert torch.equal(difference, after[name] - before[name])
    assert sum(bool(difference.any()) for difference in task.values()) > 0.9 * len(task)


def test_all_linear_is_every_linear_module_but_the_head(
    bases: Any, text: Path, tmp_path: Path
) -> None:
    for family, expected in (
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("llama", {*FAMILIES["llama"][2], "gate_proj", "up_proj", "down_proj"}),
    ):
        folder = tmp_path / family
        argv = flags(bases(family), text, folder, "--steps", "1", "--target_modules", "all-linear")
        assert finetune_lora.main(argv) == 0
        config = json.loads((folder / "adapter_config.json").read_text())
        assert set(config["target_modules"]) == expected


# ---- optimiser steps --------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(bases: Any, text: Path, tmp_path: Path) -> None:
    """For masked models too, whose batches predict different numbers of tokens."""
    for family in ("llama", "bert"):
        histories = []
        for batch, accumulated in (("8", "1"), ("2", "4")):
            folder = tmp_path / f"{family}-{batch}"
            more = ("--batch_size", batch, "--gradient_accumulation_steps", accumulated)
            assert finetune_lora.main(flags(bases(family), text, folder, *more)) == 0
            histories.append(log_of(folder)["history"])
        if family == "llama":  # a masked batch draws its masks in another order
            for key in ("training_loss", "held_out_loss"):
                assert histories[0][key] == pytest.approx(histories[1][key], abs=1e-5)
        assert histories[1]["held_out_loss"][-1] < histories[1]["held_out_loss"][0]


def test_the_gradient_is_weighted_by_what_each_batch_predicts() -> None:
    """A model whose loss is the mean of w over the predicted tokens: the step is the whole mean's.

    Batches of one and of three predicted tokens with the losses 4w and 8w have the mean 7w, not 6w.
    """

    class Fake(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.1))
            self.losses = iter([4.0, 8.0])

        def forward(self, **_: torch.Tensor) -> Any:
            return type("Output", (), {"loss": self.w * next(self.losses)})

    class Objective:
        counts = iter([1, 3])

        def inputs(self, windows: torch.Tensor, _: torch.Generator) -> dict[str, torch.Tensor]:
            return {"input_ids": windows}

        def predicted(self, _: dict[str, torch.Tensor]) -> int:
            return next(self.counts)

    options = TrainingOptions(1, batch_size=1, gradient_accumulation_steps=2, sequence_length=2)
    run = Run(Fake(), options, Objective())  # type: ignore[arg-type]
    assert run.advance(torch.arange(9)) == pytest.approx(0.7)


def test_training_stops_at_the_loss_it_is_to_reach(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = flags(bases("llama"), text, tmp_path / "a", "--steps", "60", "--eval_every", "3")
    assert finetune_lora.main([*argv, "--until_loss", "5.4", "--learning_rate", "0.05"]) == 0
    history = log_of(tmp_path / "a")["history"]
    assert history["held_out_loss"][-1] <= 5.4 < history["held_out_loss"][-2]
    assert history["held_out_steps"] == list(range(0, history["held_out_steps"][-1] + 1, 3))
    assert history["steps"][-1] == history["held_out_steps"][-1] < 60
    capsys.readouterr()
    argv = flags(bases("llama"), text, tmp_path / "b", "--until_loss", "0.01")
    assert finetune_lora.main(argv) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "--until_loss 0.01 was not reached"
    assert (tmp_path / "b/adapter_model.safetensors").is_file()


def test_mixed_precision_on_a_cpu_is_said_not_to_apply(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = flags(bases("llama"), text, tmp_path / "a", "--steps", "1", "--mixed_precision", "bf16")
    argv.remove("--quiet")
    assert finetune_lora.main(argv) == 0
    err = capsys.readouterr().err
    assert "--mixed_precision bf16 applies to a GPU only: training in fp32 on cpu\n" in err
    assert "step 1/1: loss " in err and "tokens/s" in err and "left" in err
    assert log_of(tmp_path / "a")["training"]["mixed_precision"] == "no"


def test_mixed_precision_computes_in_bf16_and_trains_in_fp32(bases: Any) -> None:
    """autocast works on a CPU too, where the script does not use it."""
    tokens = torch.arange(400) % 90
    losses = {}
    for precision in ("no", "bf16"):
        options = TrainingOptions(20, 2, 16, learning_rate=0.01, mixed_precision=precision)
        run = Run(AutoModelForCausalLM.from_pretrained(bases("llama")), options)
        losses[precision] = train(run, tokens, tokens[:64]).training_loss
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["no"], abs=0.05)
    assert losses["bf16"] != losses["no"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu(bases: Any, text: Path, tmp_path: Path, precision: str) -> None:
    argv = flags(bases("llama"), text, tmp_path / "a", "--steps", "30", "--learning_rate", "0.05")
    argv += ["--device", "cuda:0", "--mixed_precision", precision]
    assert finetune_lora.main(argv) == 0
    log = log_of(tmp_path / "a")
    assert log["loss"]["after"] < log["loss"]["before"] - 0.1
    assert log["memory"]["peak_on_gpu"] > log["memory"]["training"]
    assert {tensor.dtype for tensor in weights(tmp_path / "a").values()} == {torch.float32}


def test_the_figures_that_are_printed(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Counted by hand: r (in + out) for q, k, v, o; two fp32 moments; weights and gradients."""
    base = bases("llama")
    assert finetune_lora.main(flags(base, text, tmp_path / "a", "--steps", "1")) == 0
    whole = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    own = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2)
    out = capsys.readouterr().out.splitlines()
    assert f"{own:,} of {whole + own:,}" in out[0]
    assert f"{whole / own:.1f} times fewer" in out[0]
    memory = log_of(tmp_path / "a")["memory"]
    assert memory == {
        "optimizer_measured": 8 * own,
        "optimizer": 8 * own,
        "optimizer_full": 8 * whole,
        "training": 4 * (whole + own) + 4 * own + 8 * own,
        "training_full": 16 * whole,
        "peak_on_gpu": None,
    }


# ---- checkpoints ------------------------------------------------------------------------------

CASES = {
    "lora": ("llama", ("--dropout", "0.1")),
    "full": ("gpt2", ("--method", "full")),  # GPT-2 has dropout of its own
    "masked": ("bert", ("--gradient_accumulation_steps", "2", "--weight_decay", "0.1")),
}


def tensor_file(folder: Path) -> bytes:
    (file,) = folder.glob("*model.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    bases: Any, text: Path, tmp_path: Path, case: str
) -> None:
    family, more = CASES[case]
    argv = [*flags(bases(family), text, tmp_path / "killed", *more), "--steps", "60"]
    argv += ["--save_every", "20", "--keep_checkpoints", "2", "--eval_every", "30"]
    command = [sys.executable, str(ROOT / "finetune_lora.py"), *argv]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/training_log.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert finetune_lora.main(argv) == 0
        argv[argv.index("--output_dir") + 1] = str(tmp_path / "whole")
        assert finetune_lora.main(argv[: argv.index("--save_every")] + argv[-2:]) == 0
    finally:
        torch.set_num_threads(threads)
    assert tensor_file(tmp_path / "killed") == tensor_file(tmp_path / "whole")
    logs = [log_of(tmp_path / name) for name in ("killed", "whole")]
    assert logs[0]["history"] == logs[1]["history"]
    assert names(tmp_path) == ["killed", "whole"]
    kept = {name for name in names(tmp_path / "killed") if "checkpoint" in name}
    assert kept == {"checkpoint-40", "checkpoint-60"}
    assert set(names(tmp_path / "killed")) - kept == set(names(tmp_path / "whole"))


def test_peft_s_backend_goes_on_too(bases: Any, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    argv = flags(bases("llama"), text, folder, "--backend", "peft", "--dropout", "0.1")
    argv += ["--save_every", "6"]
    assert finetune_lora.main(argv) == 0
    before = {file.name: file.read_bytes() for file in folder.glob("adapter*")}
    shutil.rmtree(folder / "checkpoint-12")
    for file in folder.glob("*.*"):
        file.unlink()
    assert finetune_lora.main(argv) == 0
    assert {file.name: file.read_bytes() for file in folder.glob("adapter*")} == before


def test_a_checkpoint_is_an_adapter_of_its_own(bases: Any, text: Path, tmp_path: Path) -> None:
    base = bases("llama")
    more = ("--warmup_steps", "0", "--schedule", "constant_with_warmup", "--save_every", "2")
    for name, steps in (("a", "4"), ("b", "2")):
        argv = flags(base, text, tmp_path / name, *more, "--steps", steps)
        assert finetune_lora.main(argv) == 0
    assert tensor_file(tmp_path / "a/checkpoint-2") == tensor_file(tmp_path / "b")
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "a/checkpoint-2"
    )
    for file in (tmp_path / "a").rglob("*"):
        assert file.suffix in ("", ".json", ".safetensors", ".png"), file  # nothing is pickled


def test_other_settings_do_not_go_on_with_a_checkpoint(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture, copied: Any
) -> None:
    folder = tmp_path / "a"
    argv = flags(bases("llama"), text, folder, "--save_every", "6")
    assert finetune_lora.main(argv) == 0
    (folder / "training_log.json").unlink()  # as if it had been interrupted
    for file in folder.glob("*.*"):
        file.unlink()
    capsys.readouterr()
    assert finetune_lora.main([*argv, "--learning_rate", "0.5"]) == 2
    err = capsys.readouterr().err
    assert "checkpoint-12" in err and "training.learning_rate: 0.01, not 0.5" in err
    other = copied(bases("llama"))  # of the same shapes
    edit_tensors(other / "model.safetensors", lambda tensors: tensors["lm_head.weight"].neg_())
    assert finetune_lora.main([*argv, "--base_model", str(other)]) == 2
    assert "other settings (base: " in capsys.readouterr().err
    edit_json(folder / "checkpoint-12/training_state.json", optimizer_groups=[])
    assert finetune_lora.main(argv) == 2
    assert "checkpoint-12: its training state is damaged" in capsys.readouterr().err
    assert names(folder) == ["checkpoint-12", "checkpoint-6"]


def test_a_finished_run_is_replaced_by_one_with_other_settings(
    bases: Any, text: Path, tmp_path: Path
) -> None:
    argv = flags(bases("llama"), text, tmp_path / "a", "--save_every", "6")
    assert finetune_lora.main(argv) == 0
    assert finetune_lora.main([*argv, "--seed", "1", "--save_every", "12"]) == 0
    assert [n for n in names(tmp_path / "a") if "checkpoint" in n] == ["checkpoint-12"]
    assert log_of(tmp_path / "a")["training"]["seed"] == 1


def test_checkpoints_of_another_program_are_not_replaced(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    mine = tmp_path / "checkpoint-500/adapter_model.safetensors"
    mine.parent.mkdir()
    mine.write_text("a week of training")
    assert finetune_lora.main(flags(bases("llama"), text, tmp_path)) == 2
    assert "checkpoint-500, which is not an output" in capsys.readouterr().err
    assert mine.read_text() == "a week of training"


def test_a_run_that_is_done_trains_no_further(bases: Any, text: Path) -> None:
    options = TrainingOptions(steps=1, batch_size=1, sequence_length=8)
    run = Run(AutoModelForCausalLM.from_pretrained(bases("llama")), options)
    tokens = torch.arange(64)
    train(run, tokens, tokens)
    after = {name: p.clone() for name, p in run.model.named_parameters()}
    train(run, tokens, tokens)
    assert_same_bits(after, dict(run.model.named_parameters()))
    assert run.history.held_out_steps == [0, 1]


def test_lora_md_states_what_is_counted(tmp_path: Path, monkeypatch: Any, capsys: Capture) -> None:
    """And the counts are those of the paper (arXiv 2106.09685: 18 M for r = 4, 4.7 M for r = 1,
    whose factors on queries and values are as many as those of c_attn) and of StarCoder2-3B."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    make = importlib.import_module("make_starcoder2_3b_shapes")
    starcoder2, gpt3 = str(tmp_path / "shapes"), str(ROOT / "examples/gpt3-175b-shapes")
    make.write_shapes(starcoder2)
    adapter = {
        (gpt3, "4", None): 96 * 4 * (12288 + 3 * 12288),
        (starcoder2, "8", None): 4_546_560,
        (starcoder2, "8", "all-linear"): 4_546_560 + 30 * 2 * 8 * (3072 + 12288),
        (str(ROOT / "examples/starcoder2-mini"), "8", None): 107_520,
    }
    rows = [row for row in (ROOT / "LORA.md").read_text().splitlines() if " of " in row]
    rows = [row for row in rows if row.startswith("|")]
    for ((base, rank, targets), trainable), row in zip(adapter.items(), rows, strict=True):
        more = ["--target_modules", targets] if targets else []
        assert (
            finetune_lora.main(["--count_only", "--base_model", base, "--rank", rank, *more]) == 0
        )
        parameters, optimizer, memory = capsys.readouterr().out.splitlines()
        assert f" {trainable:,} of " in parameters
        for printed in (parameters, optimizer, memory):
            quantity = re.search(r": ([\d,]+ of [\d,]+|[\d.]+ .B)", printed)
            ratio = re.search(r"([\d,.]+) times", printed)
            assert quantity and quantity[1] in row
            assert ratio and ratio[1] in row
    assert finetune_lora.main(["--count_only", "--base_model", gpt3, "--rank", "1"]) == 0
    assert "4,718,592 of 174,608,977,920" in capsys.readouterr().out
    argv = ["--count_only", "--base_model", gpt3, "--target_modules", "q_proj"]
    assert finetune_lora.main(argv) == 2
    assert "its linear modules are c_attn, c_fc, c_proj, lm_head" in capsys.readouterr().err


# ---- what is refused --------------------------------------------------------------------------


def test_a_masked_model_without_a_mask_token(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture, copied: Any
) -> None:
    bert = copied(bases("bert"))
    save_byte_tokenizer(bert)
    assert finetune_lora.main(flags(bert, text, tmp_path / "a")) == 2
    assert "no mask token" in capsys.readouterr().err


def test_windows_longer_than_roberta_has_positions_for(
    bases: Any, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """66 positions, of which the first is padding's: RoBERTa counts from the one after."""
    argv = flags(bases("roberta"), text, tmp_path / "a", "--sequence_length", "66")
    assert finetune_lora.main(argv) == 2
    assert "at most 65" in capsys.readouterr().err
    assert finetune_lora.main([*argv, "--sequence_length", "65", "--steps", "1"]) == 0


def test_weights_decay_and_biases_do_not():
    """AdamW without a gradient only decays: a matrix loses lr * weight_decay of itself."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = make_optimizer(layer, TrainingOptions(learning_rate=0.1, weight_decay=0.5))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])
