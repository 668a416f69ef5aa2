"""A model, an adapter or a task vector given for another: one line that says which, status 2."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

import extract_task_vectors
import merge_lora
from taskvec.kinds import MODEL, mistaken_file
from tests.models import load

IS_VECTOR = "is a task vector, not a model; compare_lora_task_vector.py takes it as --task_vector"
IS_ADAPTER = "is an adapter, not a model; give it as --lora_path"
IS_MODEL = "is a model, not an adapter; give it as --base_model or --finetuned_model"

# script, the flags that are given something else for, what is given, and what is said
COMPARE, EXTRACT = "compare_lora_task_vector", "extract_task_vectors"
INTRUDERS, VALIDATION = "find_intruder_dimensions", "final_validation"
CASES = [
    *[
        (script, "finetuned_model", wrong, said)
        for script in (COMPARE, EXTRACT, INTRUDERS, VALIDATION, "investigate_parameter_changes")
        for wrong, said in [
            ("vector", IS_VECTOR),
            ("vector/task_vector.safetensors", IS_VECTOR),
            ("renamed.safetensors", IS_VECTOR),
            ("lora", IS_ADAPTER),
            ("lora/adapter_model.safetensors", IS_ADAPTER),
        ]
    ],
    *[
        (script, "base_model", wrong, said)
        for script in (COMPARE, EXTRACT, "merge_lora", "visualize_model_structure")
        for wrong, said in [("vector", IS_VECTOR), ("lora", IS_ADAPTER)]
    ],
    *[
        (script, "lora_path", wrong, said)
        for script in (COMPARE, INTRUDERS, VALIDATION, "merge_lora", "debug_lora_structure")
        for wrong, said in [("merged", IS_MODEL), ("vector", "is a task vector, not an adapter")]
    ],
    (COMPARE, "task_vector_path", "lora", "is an adapter, not a task vector; give it as --lora_pa"),
    (COMPARE, "task_vector_path", "lora/adapter_model.safetensors", "is an adapter, not a task ve"),
    (COMPARE, "task_vector_path", "merged", "is a model, not a task vector; give it as --base_mod"),
]
TAKES = {
    COMPARE: {"base_model": "base", "lora_path": "lora", "finetuned_model": "merged"},
    EXTRACT: {"base_model": "base", "finetuned_model": "merged"},
    INTRUDERS: {"base_model": "base"},
    VALIDATION: {"base_model": "base", "lora_path": "lora"},
    "investigate_parameter_changes": {"base_model": "base"},
    "merge_lora": {"base_model": "base", "lora_path": "lora"},
    "visualize_model_structure": {},
    "debug_lora_structure": {"base_model": "base"},
}


@pytest.fixture(scope="module")
def things(llama, llama_lora, tmp_path_factory):
    """Directories named base, lora, merged and vector, and the vector's file by another name."""
    home = tmp_path_factory.mktemp("things")
    shutil.copytree(llama, home / "base")
    shutil.copytree(llama_lora, home / "lora")
    merge_lora.merge(str(llama), str(llama_lora), home / "merged", device="cpu")
    extract_task_vectors.extract(str(llama), str(home / "merged"), home / "vector", device="cpu")
    shutil.copyfile(home / "vector" / "task_vector.safetensors", home / "renamed.safetensors")
    return home


@pytest.mark.parametrize(("script", "flag", "wrong", "said"), CASES)
def test_one_thing_given_for_another(things, tmp_path, capsys, script, flag, wrong, said):
    given = {**TAKES[script], flag: wrong}
    if flag == "task_vector_path":
        del given["finetuned_model"]
    words = [word for f, path in given.items() for word in (f"--{f}", str(things / path))]
    words += ["--output_dir", str(tmp_path / "out")]
    assert importlib.import_module(script).main(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1 and f"{things / wrong}: {said}" in lines[0], captured.err
    assert "✅" not in captured.out and not (tmp_path / "out").exists()


def test_a_model_saved_with_its_adapter_unmerged(things, tmp_path, capsys):
    model = PeftModel.from_pretrained(load(things / "base"), things / "lora")
    state = {name: tensor.contiguous() for name, tensor in model.base_model.state_dict().items()}
    path = tmp_path / "unmerged"
    shutil.copytree(things / "base", path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    words = ["--base_model", str(things / "base"), "--finetuned_model", str(path)]
    assert extract_task_vectors.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{path}: was saved with an adapter in it that is not merged; call merge_and_unl" in said


def test_a_model_is_what_its_tensors_say_whatever_else_lies_there(things, tmp_path):
    """A trainer's directory holds an adapter's files beside a model's."""
    both = tmp_path / "both"
    shutil.copytree(things / "merged", both)
    shutil.copy(things / "lora" / "adapter_config.json", both)
    found = extract_task_vectors.extract(
        str(things / "base"), str(both), tmp_path / "out", device="cpu"
    )
    assert found.nonzero_parameters == 6
    names = list(load_file(both / "model.safetensors"))
    assert mistaken_file(Path("model.safetensors"), names, {"format": "pt"}, MODEL) is None
