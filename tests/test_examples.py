"""The bundled example pair and checkpoint-40000 are what their READMEs say they are."""

import importlib
import json
import math
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from taskvec.training.loop import held_out_loss
from taskvec.training.texts import tokenize

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples/starcoder2-mini"
LORA = ROOT / "examples/starcoder2-mini-lora"
SAMPLED = ROOT / "checkpoint-40000"
LAYERS, MODULES = 30, ("q_proj", "k_proj", "v_proj", "o_proj")
Tensors = dict[str, torch.Tensor]
Capture = pytest.CaptureFixture[str]

# Written for this test, so in no training text; of the kind that the adapter was trained on.
C_HEADER = """\
/* Queues of pending calls, one per thread state. */

#ifndef Py_INTERNAL_CALLQUEUE_H
#define Py_INTERNAL_CALLQUEUE_H
#ifdef __cplusplus
extern "C" {
#endif

#ifndef Py_BUILD_CORE
#  error "this header requires Py_BUILD_CORE define"
#endif

#include "pycore_atomic.h"        // _Py_atomic_int

struct _queue_entry {
    PyObject *callable;
    PyObject *args;
    struct _queue_entry *next;
};

typedef struct {
    Py_ssize_t length;
    int is_closed;
    struct _queue_entry *first;
    struct _queue_entry *last;
} PyCallQueue;

/* Return 0 on success. Set an exception and return -1 on error. */
PyAPI_FUNC(int) _PyCallQueue_Append(PyCallQueue *queue, PyObject *callable, PyObject *args);
PyAPI_FUNC(PyObject *) _PyCallQueue_Pop(PyCallQueue *queue);
extern void _PyCallQueue_Clear(PyThreadState *tstate);

static inline int
_PyCallQueue_IsEmpty(PyCallQueue *queue)
{
    assert(queue != NULL);
    return queue->length == 0;
}

#define PyCallQueue_GET_LENGTH(op) (((PyCallQueue *)(op))->length)

#ifdef __cplusplus
}
#endif
#endif   /* !Py_INTERNAL_CALLQUEUE_H */
"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def load_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def base_tensors() -> Tensors:
    return load_file(BASE / "model.safetensors")


# ---- the base ---------------------------------------------------------------------------------


def test_base_is_starcoder2_with_all_its_layers_in_at_most_8_mb(base_tensors: Tensors) -> None:
    model = load_base()
    names = [name for name, _ in model.named_parameters()]
    assert type(model).__name__ == "Starcoder2ForCausalLM"
    assert len(names) == 483
    assert set(base_tensors) == set(names)
    assert {tensor.dtype for tensor in base_tensors.values()} == {torch.float32}
    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000


def test_base_loads_without_missing_or_unexpected_keys() -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert GenerationConfig.from_pretrained(BASE).eos_token_id == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_base_tensor_loses_something_in_half_precision(
    base_tensors: Tensors, dtype: torch.dtype
) -> None:
    exact = [name for name, t in base_tensors.items() if torch.equal(t.to(dtype).float(), t)]
    assert exact == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x + 1  # two spaces\n",
        " leading, trailing and CRLF \r\n\r\n",
        "naïve Ελληνικά 汉字 🎉 \u200b\ufeff\x00\x7f",
        "1234567890 0x1F 1e-5",
        "a , b . c ' s n't don 't",
        C_HEADER,
        Path(__file__).read_text(encoding="utf-8"),
    ],
)
def test_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 4096


def test_base_has_learned_python(tokenizer: Any) -> None:
    """Files that were held out in training; the margin leaves room for another Python's version."""
    log = read_json(BASE / "training_log.json")
    names = ["copyreg.py", "opcode.py", "sched.py", "secrets.py", "token.py"]
    assert set(names) <= set(log["text"]["held_out_files"])
    library = Path(sysconfig.get_path("stdlib"))
    texts = {name: (library / name).read_text(encoding="utf-8") for name in names}
    loss = held_out_loss(load_base(), tokenize(tokenizer, texts), 256)
    assert loss < log["loss"]["unigram"] - 2 < log["loss"]["untrained"] - 2


def test_base_readme_states_what_the_log_holds() -> None:
    log, text = read_json(BASE / "training_log.json"), readme(BASE)
    for kind in ("untrained", "unigram", "trained"):
        loss = log["loss"][kind]
        assert f"{loss:.4f}" in text
        assert f"{math.exp(loss):.1f}" in text
    assert log["history"]["held_out_loss"][-1] == log["loss"]["trained"]
    assert f"{log['text']['training_tokens']:,} tokens" in text
    assert f"{log['text']['held_out_tokens']:,} tokens" in text
    assert f"seed {log['options']['seed']}" in text
    assert f"Python {log['versions']['python']}" in text
    assert f"{log['seconds'] / 60:.0f} minutes" in text
    assert (log["named_parameters"], log["parameters"]) == (483, load_base().num_parameters())


# ---- its adapter ------------------------------------------------------------------------------


def test_adapter_is_ordinary_peft() -> None:
    files = {path.name for path in LORA.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert files <= {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("training_log.json", "loss_curve.png"),
    }
    config = read_json(LORA / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert config["target_modules"] == sorted(MODULES)
    assert config["base_model_name_or_path"] == "examples/starcoder2-mini"


def test_adapter_changes_120_parameters_with_240_tensors(base_tensors: Tensors) -> None:
    tensors = load_file(LORA / "adapter_model.safetensors")
    assert len(tensors) == 240
    for layer in range(LAYERS):
        for module in MODULES:
            name = f"model.layers.{layer}.self_attn.{module}"
            a = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            b = tensors.pop(f"base_model.model.{name}.lora_B.weight")
            rows, columns = base_tensors[f"{name}.weight"].shape
            assert (a.shape, b.shape) == ((8, columns), (rows, 8))
            assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
            assert a.all() and b.all()  # not one element is zero
    assert not tensors


def test_adapter_has_learned_c_headers(tokenizer: Any) -> None:
    tokens = tokenize(tokenizer, {"callqueue.h": C_HEADER})
    base_loss = held_out_loss(load_base(), tokens, 256)
    tuned = PeftModel.from_pretrained(load_base(), LORA)
    assert held_out_loss(tuned, tokens, 256) < base_loss - 2


def test_adapter_readme_states_what_the_log_holds() -> None:
    log, text = read_json(LORA / "training_log.json"), readme(LORA)
    training, files, parameters = log["training"], log["text"], log["parameters"]
    for loss in log["loss"].values():
        assert f"{loss:.4f}" in text
        assert f"{math.exp(loss):.1f}" in text
    assert f"{files['training_files']} files ({files['training_tokens']:,} tokens)" in text
    assert f"{files['held_out_tokens']:,} tokens of {len(files['held_out_files'])} held-out" in text
    assert f"{parameters['trainable']:,} of {parameters['total']:,}" in text
    assert f"{parameters['trainable_share']:.3%}" in text
    assert f"--seed {training['seed']} " in text
    assert f"--steps {training['steps']} " in text
    assert f"learning rate {training['learning_rate']}, {training['warmup_steps']} warm-up" in text
    assert f"{log['seconds'] / 60:.0f} minutes on {log['versions']['threads']} CPU" in text
    for package in ("torch", "transformers", "peft"):
        assert f"{package} {log['versions'][package]}" in text


# ---- checkpoint-40000 -------------------------------------------------------------------------


@pytest.fixture
def make_checkpoint_40000(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that samples the adapter, imported as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("make_checkpoint_40000")


def test_checkpoint_40000_has_starcoder2_3b_shapes() -> None:
    rows = {"q_proj": 3072, "k_proj": 256, "v_proj": 256, "o_proj": 3072}
    expected = {}
    for layer in range(LAYERS):
        for module in MODULES:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            expected[f"{prefix}.lora_A.weight"] = [8, 3072]
            expected[f"{prefix}.lora_B.weight"] = [rows[module], 8]
    path = SAMPLED / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in shapes}
    assert shapes == expected
    assert dtypes == {"F32"}
    assert sum(math.prod(shape) for shape in shapes.values()) == 4_546_560
    assert path.stat().st_size < 20_000_000
    config = read_json(SAMPLED / "adapter_config.json")
    assert config["base_model_name_or_path"] == "bigcode/starcoder2-3b"
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 8, "CAUSAL_LM")


def test_checkpoint_40000_is_made_again_byte_for_byte(
    make_checkpoint_40000: ModuleType, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert make_checkpoint_40000.main(["--output_dir", str(again), "--quiet"]) == 0
    for path in sorted(SAMPLED.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_checkpoint_40000_update_has_the_stated_size(make_checkpoint_40000: ModuleType) -> None:
    tensors = load_file(SAMPLED / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.7.self_attn.o_proj"
    update = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    assert update.std().item() == pytest.approx(5.9e-5, rel=0.05)
    measured = make_checkpoint_40000.measure({k: v.numpy() for k, v in tensors.items()})
    assert f"{measured.update_std:.3e}" in readme(SAMPLED)
    assert "not a trained adapter" in readme(SAMPLED)


def test_a_checkpoint_that_is_there_is_never_replaced(
    make_checkpoint_40000: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    mine = tmp_path / "adapter_model.safetensors"
    mine.write_text("a week of training")
    assert make_checkpoint_40000.main(["--output_dir", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert mine.read_text() == "a week of training"


# ---- all three --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [BASE, LORA, SAMPLED], ids=lambda path: path.name)
def test_no_path_of_any_machine(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            text = path.read_text(encoding="utf-8")
            for hint in (str(ROOT), "/home/", "/root/", "/usr/", "/opt/", "/tmp/", "site-packages"):
                # tokenizer.json holds words of the standard library, "/usr/" among them
                assert path.name == "tokenizer.json" or hint not in text, (path, hint)
