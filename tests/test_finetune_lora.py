"""finetune_lora.py on a small Llama: what it trains, what it writes, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import finetune_lora
from taskvec.training.texts import read_texts, split_held_out

TEXT = "The quick brown fox jumps over the lazy dog; " * 60
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS, HIDDEN, RANK = 2, 32, 4
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {byte: i for i, byte in enumerate(alphabet, start=1)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


def flags(base: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--base_model", str(base), "--text", str(text), "--output_dir", str(output)),
        *("--rank", str(RANK), "--alpha", "8", "--steps", "12", "--batch_size", "4"),
        *("--sequence_length", "32", "--learning_rate", "0.02", "--device", "cpu", "--quiet"),
        *more,
    ]


@pytest.fixture(scope="module")
def adapter(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "adapter"
    assert finetune_lora.main(flags(base, text, folder)) == 0
    return folder


# ---- what it trains and writes ----------------------------------------------------------------


def test_writes_exactly_these_files(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss_curve.png",
        "training_log.json",
    ]
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


def test_tensors_have_peft_names_shapes_and_dtype(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    expected = {
        f"{prefix}.{layer}.self_attn.{module}.lora_{matrix}.weight": shape
        for layer in range(LAYERS)
        for module in MODULES
        for matrix, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK)))
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_configuration_says_what_was_asked(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, 8, "CAUSAL_LM")
    assert config["target_modules"] == sorted(MODULES)
    assert config["base_model_name_or_path"] == str(base)


def test_peft_loads_the_adapter_and_finds_the_logged_loss(
    adapter: Path, base: Path, text: Path
) -> None:
    log = json.loads((adapter / "training_log.json").read_text())
    assert log["loss"]["after"] < log["loss"]["before"] - 0.1
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    # one file: its last tenth is held out; a byte is a token, and id 0 ends the text
    held_out = TEXT[len(TEXT) - len(TEXT) // 10 :]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = torch.tensor([*tokenizer(held_out)["input_ids"], 0])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    for model, logged in ((plain, log["loss"]["before"]), (tuned, log["loss"]["after"])):
        with torch.no_grad():
            logits = model(input_ids=windows).logits[:, :-1].double()
        log_probability = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])
        assert -log_probability.mean().item() == pytest.approx(logged, abs=1e-5)


def test_parameter_counts(adapter: Path, base: Path, capsys: Capture) -> None:
    log = json.loads((adapter / "training_log.json").read_text())
    trainable = LAYERS * len(MODULES) * RANK * 2 * HIDDEN
    own = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert log["parameters"] == {
        "trainable": trainable,
        "total": own + trainable,
        "trainable_share": trainable / (own + trainable),
    }


def test_same_seed_same_bytes_other_seed_other_bytes(
    adapter: Path, base: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    def weights(folder: Path) -> bytes:
        return (folder / "adapter_model.safetensors").read_bytes()

    assert finetune_lora.main(flags(base, text, tmp_path / "same")) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [
        "Trainable parameters",
        "Optimiser memory",
        "Training memory",
        "Held-out loss",
        "Adapter saved to",
    ]
    assert finetune_lora.main(flags(base, text, tmp_path / "other", "--seed", "1")) == 0
    assert weights(tmp_path / "same") == weights(adapter)
    assert weights(tmp_path / "other") != weights(adapter)


def test_base_is_left_as_it_was(adapter: Path, base: Path) -> None:
    assert {path.name for path in base.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_yaml_gives_values_and_a_flag_wins(base: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yml"
    config.write_text(
        f"base_model: {base}\ntext: [{text}]\nsteps: 1\nsequence_length: 32\nrank: 2\n"
        f"target_modules: [q_proj]\noutput_dir: {tmp_path / 'out'}\ndevice: cpu\nbatch_size: 2\n"
    )
    assert finetune_lora.main(["--config", str(config), "--rank", "3", "--quiet"]) == 0
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (saved["r"], saved["target_modules"]) == (3, ["q_proj"])


# ---- the split into training and held-out text ------------------------------------------------


def test_many_files_are_held_out_whole_and_always_the_same() -> None:
    texts = {f"{i}.txt": str(i) * 100 for i in range(40)}
    training, held_out = split_held_out(texts, 0.1)
    assert training | held_out == texts
    assert not training.keys() & held_out.keys()
    assert 0 < sum(map(len, held_out.values())) <= 0.1 * sum(map(len, texts.values()))
    reordered = dict(reversed(texts.items()))
    assert split_held_out(reordered, 0.1)[1].keys() == held_out.keys()


def test_of_few_files_the_end_is_held_out() -> None:
    training, held_out = split_held_out({"a": "x" * 90 + "y" * 10}, 0.1)
    assert (training, held_out) == ({"a": "x" * 90}, {"a": "y" * 10})


def test_folder_is_searched_by_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.c").write_text("int a;")
    (tmp_path / "b.h").write_text("int b;")
    assert read_texts([tmp_path], "*.c") == {"deep/a.c": "int a;"}


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(folder)
    texts = read_texts([tmp_path / "one", tmp_path / "two"], "*.txt")
    assert sorted(texts.values()) == ["one", "two"]


# ---- what it refuses --------------------------------------------------------------------------


def refused(capsys: Capture, argv: list[str], *words: str) -> str:
    """Exit 2 with one line on stderr that holds these words, and nothing on stdout."""
    assert finetune_lora.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err
    return err


def test_missing_base(capsys: Capture, text: Path, tmp_path: Path) -> None:
    refused(capsys, flags(tmp_path / "nowhere", text, tmp_path / "out"), "nowhere", "no such")


def test_base_without_tokenizer(capsys: Capture, base: Path, text: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base / name).read_bytes())
    refused(capsys, flags(bare, text, tmp_path / "out"), str(bare), "tokenizer")
    assert not (tmp_path / "out").exists()


def test_base_with_a_missing_tensor(
    capsys: Capture, base: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "damaged")
    weights = tmp_path / "damaged/model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    argv = flags(tmp_path / "damaged", text, tmp_path / "out")
    refused(capsys, argv, "damaged", "model.norm.weight")


def test_no_text_named(capsys: Capture, base: Path, tmp_path: Path) -> None:
    argv = ["--base_model", str(base), "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "--text")


def test_missing_text(capsys: Capture, base: Path, tmp_path: Path) -> None:
    refused(capsys, flags(base, tmp_path / "no.txt", tmp_path / "out"), "no.txt", "no such file")


def test_empty_text(capsys: Capture, base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(capsys, flags(base, empty, tmp_path / "out"), "empty.txt", "no text")


def test_folder_without_a_match(capsys: Capture, base: Path, text: Path, tmp_path: Path) -> None:
    argv = flags(base, text.parent, tmp_path / "out", "--glob", "*.rs")
    refused(capsys, argv, str(text.parent), "*.rs")


def test_binary_text(capsys: Capture, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(b"\x89PNG\0\0")
    refused(capsys, flags(base, file, tmp_path / "out"), "picture.txt", "binary")


def test_too_little_text(capsys: Capture, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("short")
    err = refused(capsys, flags(base, file, tmp_path / "out"), "too little text")
    assert "4 x 32" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_target_module_that_does_not_exist(
    capsys: Capture, base: Path, text: Path, tmp_path: Path
) -> None:
    argv = flags(base, text, tmp_path / "out", "--target_modules", "q_proj", "qkv_proj")
    refused(capsys, argv, "qkv_proj", "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj")
    assert list(tmp_path.iterdir()) == []


def test_output_directory_that_holds_something_else(
    capsys: Capture, base: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused(capsys, flags(base, text, tmp_path), "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_adapter_of_another_program_is_not_replaced(
    capsys: Capture, base: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    refused(capsys, flags(base, text, tmp_path), "adapter_model.safetensors")
    assert (tmp_path / "adapter_model.safetensors").read_text() == "mine"


def test_output_inside_the_base(capsys: Capture, base: Path, text: Path) -> None:
    refused(capsys, flags(base, text, base / "adapter"), "input")
    assert not (base / "adapter").exists()


def test_gpu_that_is_not_there(capsys: Capture, base: Path, text: Path, tmp_path: Path) -> None:
    argv = flags(base, text, tmp_path / "out", "--device", "cuda:99")
    refused(capsys, argv, "cuda:99")


def test_window_longer_than_the_base_takes(
    capsys: Capture, base: Path, text: Path, tmp_path: Path
) -> None:
    argv = flags(base, text, tmp_path / "out", "--sequence_length", "128")
    refused(capsys, argv, "--sequence_length 128", "64")


def test_loss_that_diverges(capsys: Capture, base: Path, text: Path, tmp_path: Path) -> None:
    argv = flags(base, text, tmp_path / "out", "--learning_rate", "1e30")
    refused(capsys, argv, "--learning_rate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--rank", "0"),
        ("--rank", "two"),
        ("--dropout", "1"),
        ("--learning_rate", "nan"),
        ("--steps", "-3"),
        ("--sequence_length", "1"),
        ("--weight_decay", str(-math.inf)),
    ],
)
def test_flag_values_out_of_range(
    capsys: Capture, base: Path, text: Path, tmp_path: Path, flag: str, value: str
) -> None:
    refused(capsys, flags(base, text, tmp_path / "out", f"{flag}={value}"), flag, value)


def test_help_needs_no_torch() -> None:
    code = "import sys, finetune_lora as f; f.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
