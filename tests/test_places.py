"""Where inputs lie and outputs go: links, odd names, and an output on top of an input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import analyze_task_vectors
import merge_lora
from taskvec import cli
from tests import hostile
from tests.checks import names
from tests.hostile import Sandbox

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path / "home")


def test_a_link_out_of_the_model_is_pointed_out(sandbox, capsys):
    secret = sandbox.put("secret", b"not for the model")
    (sandbox.home / "base" / "tokenizer.json").symlink_to(secret)
    ending = sandbox.run("merge_lora")
    assert ending.status == 0
    assert f"tokenizer.json is a link: what it leads to, {secret.resolve()}" in ending.err


def test_the_links_of_the_hubs_cache_need_no_remark(sandbox, hub, tmp_path, monkeypatch):
    sandbox.put("base/tokenizer.json", b"{}")
    base = hub(sandbox.home / "base", "tests/linked-base", "c" * 40)
    lora = hub(sandbox.home / "lora", "tests/linked-lora", "d" * 40)
    words = ["--base_model", base, "--lora_path", lora, "--output_dir", str(sandbox.out)]
    ending = hostile.run_main(merge_lora.main, [*words, "--device", "cpu", "--quiet"])
    assert (ending.status, ending.err) == (0, "")
    from_cache = {name: (sandbox.out / name).read_bytes() for name in names(sandbox.out)}
    assert sandbox.run("merge_lora").status == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert not (sandbox.out / name).is_symlink()
        assert (sandbox.out / name).read_bytes() == from_cache[name]


@pytest.mark.parametrize("place", ["with spaces in it", "größe-模型-🧪", "-dash", "a'b\"c$d"])
def test_any_name_that_a_directory_can_have(tmp_path, place):
    sandbox = Sandbox(tmp_path / place / "home")
    for script in ("merge_lora", "extract_task_vectors", "compare_lora_task_vector"):
        assert sandbox.run(script).status == 0
        assert sandbox.out.is_dir()


SIGN_AWARE = ("ties", "dare_linear", "dare_ties")
MODELS, ALL = ["base", "lora"], ["base", "lora", "vector"]
WRITERS = {
    "merge_lora": MODELS,
    "extract_task_vectors": ["base"],
    "compare_lora_task_vector": ALL,
    "debug_lora_structure": MODELS,
    "visualize_model_structure": MODELS,
    "investigate_parameter_changes": ALL,
    "quick_precision_test": MODELS,
    "analyze_lora_vs_task_vector_math": ["base", "vector"],
    "analyze_task_vector_structure": ["vector"],
    "find_intruder_dimensions": MODELS,
    "finetune_lora": ["base", "text"],
    "final_validation": MODELS,
    "analyze_task_vectors apply": ["base", "vector"],
    "analyze_task_vectors to_lora": ALL,
    **{
        f"analyze_task_vectors {command}": ["vector"]
        for command in [
            "show",
            "add",
            "negate",
            "scale",
            "analogy",
            "ties",
            "dare_linear",
            "dare_ties",
        ]
    },
}


def test_every_script_and_command_is_in_the_list():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    commands = cli._commands(analyze_task_vectors.build_parser()).choices
    scripts = scripts - {"analyze_task_vectors"} | {f"analyze_task_vectors {c}" for c in commands}
    assert set(WRITERS) == scripts


@pytest.mark.parametrize("script", WRITERS)
@pytest.mark.parametrize("where", ["{}", "{}/out", "{}/new/out", ".", "link-{}", "link-{}/out"])
def test_no_output_on_in_or_around_an_input(sandbox, script, where):
    for directory in WRITERS[script]:
        link = sandbox.home / f"link-{directory}"
        link.symlink_to(sandbox.home / directory)
        output = sandbox.home / where.format(directory)
        refuse(sandbox, [*sandbox.words(script)[:-2], "--output_dir", str(output)], script)
        link.unlink()


def refuse(sandbox: Sandbox, words: list[str], script: str) -> None:
    before = sandbox.contents()
    ending = hostile.run_main(hostile.main_of(script), words)
    assert ending.status == 2
    assert "is, holds or lies inside the input" in ending.err
    assert sandbox.contents() == before


@pytest.mark.parametrize("flag", ["--cache_dir", "--scaled_model_dir"])
@pytest.mark.parametrize("where", ["base", "base/new", "lora", "link/new"])
def test_what_else_the_analysis_of_intruders_writes(sandbox, flag, where):
    (sandbox.home / "link").symlink_to(sandbox.home / "base")
    words = [*sandbox.words("find_intruder_dimensions"), "--scale_intruders", "0"]
    words += [flag, str(sandbox.home / where)]
    refuse(sandbox, words, "find_intruder_dimensions")
    assert not sandbox.out.exists()


def test_the_whole_chain_takes_no_place_of_a_vector_or_model_that_it_validates(sandbox):
    for flag, name in (("--task_vector_path", "vector"), ("--finetuned_model", "tuned")):
        shutil.copytree(sandbox.home / "base", sandbox.home / "tuned", dirs_exist_ok=True)
        for where in (name, f"{name}/out"):
            words = [*sandbox.words("final_validation")[:-2], flag, str(sandbox.home / name)]
            words += ["--output_dir", str(sandbox.home / where)]
            refuse(sandbox, words, "final_validation")


def test_a_link_that_is_named_as_an_input_is_not_replaced(sandbox):
    """The file that it leads to would stay, but not under the name that was given."""
    vector = sandbox.home / "vector" / "task_vector.safetensors"
    vector.rename(sandbox.home / "elsewhere.safetensors")
    vector.symlink_to(sandbox.home / "elsewhere.safetensors")
    words = ["negate", str(vector), "--output_dir", str(vector.parent), "--device", "cpu"]
    refuse(sandbox, words, "analyze_task_vectors")
