"""Several processes on one run: shares, the same bits as with one, and failures."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import final_validation
from taskvec import cli, processes
from taskvec.rounding import FORMATS
from tests.checks import names

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(count: int, *command: str, cwd: Path) -> list[subprocess.Popen[str]]:
    """Processes with the environment that a launcher gives to each."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    words = [process.communicate(timeout=120) for process in started]
    return [
        (process.returncode, out, err) for process, (out, err) in zip(started, words, strict=True)
    ]


def content(directory: Path) -> dict[str, object]:
    """The files below a directory, without what is the file system's own business."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.suffix == ".json":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [line for line in lines if "task_vector_disk_bytes" not in line]
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


def test_the_costliest_items_are_dealt_first_each_to_the_one_with_least_to_do():
    assert processes.shares_of([1, 5, 1, 4], 2) == [[1, 2], [3, 0]]
    assert processes.shares_of([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert processes.shares_of([3], 3) == [[0], [], []]
    assert processes.shares_of([], 2) == [[], []]


def test_what_is_one_process_s_work_is_done_by_the_first_alone(tmp_path):
    """They would find that another run is writing their output."""
    example = ROOT / "examples" / "starcoder2-mini"
    command = [str(ROOT / "quick_precision_test.py"), "--base_model", str(example)]
    command += ["--lora_path", f"{example}-lora", "--output_dir", str(tmp_path / "p")]
    (status, out, err), other = end(start(2, *command, cwd=tmp_path))
    assert other == (0, "", "")
    assert status == 0 and "120/483" in out and (tmp_path / "p").is_dir()
    assert "A launcher started this 2 times. It is the work of one process" in err


def test_alone_everything_is_one_s_own():
    assert processes.count() == 1 and processes.is_main()
    assert processes.by_main(lambda: 7) == 7
    assert processes.divided(lambda items: [item + 1 for item in items], [1, 2], [1, 1]) == [2, 3]
    processes.wait()


def test_a_format_that_has_travelled_is_the_same_object():
    assert all(pickle.loads(pickle.dumps(format)) is format for format in FORMATS.values())


def test_a_script_that_does_not_share_its_work_is_alone_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    counted = []

    def body(_: Namespace) -> int:
        counted.append(processes.count())
        return 0

    assert cli.run(lambda: cli.new_parser("A script."), body, []) == 0
    assert counted == [1]


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(4):
        monkeypatch.setattr(processes, "_local_rank", rank)
        found.append(cli.pick_device("auto"))
    assert found == [torch.device(f"cuda:{index}") for index in (0, 1, 0, 1)]


@pytest.mark.parametrize("count", [2, 4])
def test_the_whole_chain_gives_the_same_files_as_one_process(
    count, llama: Path, llama_lora: Path, tmp_path: Path, capsys, monkeypatch
):
    flags = ["--base_model", str(llama), "--lora_path", str(llama_lora), "--output_dir", "out"]
    flags += ["--no-behaviour", "--precisions", "fp32", "bf16", "--device", "cpu"]
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    monkeypatch.chdir(one)
    assert final_validation.main(flags) == 0
    script = str(ROOT / "final_validation.py")

    if count == 2:  # the launcher itself; the other runs do without the seconds that it takes
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        run = subprocess.run(
            [sys.executable, *launcher, "--main_process_port", str(free_port()), script, *flags],
            cwd=several,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        printed = run.stdout
    else:
        found = end(start(count, script, *flags, cwd=several))
        assert [status for status, _, _ in found] == [0] * count, found
        assert [out for _, out, _ in found[1:]] == [""] * (count - 1)
        printed = found[0][1]

    assert printed == capsys.readouterr().out
    files = content(one)
    assert content(several) == files
    assert len(files) > 10
    assert names(several) == ["out"]


def test_what_one_process_cannot_do_all_refuse_and_the_main_one_says_so(
    llama: Path, copied, llama_lora: Path, tmp_path: Path
):
    from tests.checks import edit_tensors

    base = copied(llama)
    name = "model.embed_tokens.weight"  # the largest tensor of several: the main process's own
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[name].fill_(1e6))
    flags = ["--base_model", str(base), "--lora_path", str(llama_lora), "--device", "cpu"]
    flags += ["--output_dir", "out", "--precision", "fp16"]

    found = end(start(2, str(ROOT / "merge_lora.py"), *flags, cwd=tmp_path))

    assert [status for status, _, _ in found] == [2, 2]
    assert "overflow fp16" in found[0][2]
    assert (found[1][1], found[1][2]) == ("", "")
    assert names(tmp_path) == [base.name]


def test_a_process_that_dies_ends_the_run_without_output(
    llama: Path, llama_lora: Path, tmp_path: Path
):
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import merge_lora\n"
        "from taskvec.tensorfile import TensorFileWriter\n"
        "if os.environ['RANK'] == '1':\n"
        "    TensorFileWriter.write = lambda *_: os.kill(os.getpid(), 9)\n"
        "sys.exit(merge_lora.main(sys.argv[1:]))\n"
    )
    flags = ["--base_model", str(llama), "--lora_path", str(llama_lora), "--device", "cpu"]

    found = end(start(2, "-c", program, *flags, "--output_dir", "out", cwd=tmp_path))

    assert [status for status, _, _ in found] == [2, -9]
    assert "do not answer" in found[0][2]
    assert found[0][2].count("\n") == 1
    assert names(tmp_path) == []


def test_a_launcher_that_starts_one_process_of_several_is_noticed(monkeypatch, capsys):
    """accelerate launch --num_processes 2, without --multi_gpu, on a machine without GPUs."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    assert cli.run(lambda: cli.new_parser("A script."), lambda _: 0, [], shared=True) == 0

    assert "--multi_gpu" in capsys.readouterr().err
