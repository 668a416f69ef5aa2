"""The benchmark at the smallest size: it measures, checks, refuses, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import benchmark, inputs, intruder_speed
from benchmarks.measure import CommandFailed, Measured, measure
from benchmarks.table import Row, WidthResult
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.tensorfile import TensorFileWriter

TINY = 0.01  # of StarCoder2-3B's width: 48, the smallest there is


def test_measures_the_merge_beside_cp_and_removes_everything(tmp_path, capsys):
    work, table = tmp_path / "work", tmp_path / "table.md"
    work.mkdir()
    flags = ["--width", str(TINY), "--steps", "merge", "--skip_obvious"]

    assert benchmark.main([*flags, "--work_dir", str(work), "--output", str(table)]) == 0

    shown = capsys.readouterr()
    rows = [line.split(" | ")[:2] for line in shown.out.splitlines() if line.startswith("| ")]
    assert rows[2:] == [["| read", "cat"], ["| copy", "cp -r"], ["| merge", "this project"]]
    assert table.read_text(encoding="utf-8") == shown.out
    assert "GB of disk" in shown.err
    assert list(work.iterdir()) == []


def test_base_and_adapter_are_what_transformers_and_the_project_load(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = inputs.write_config(base, TINY)
    inputs.write_base(base, shapes)
    inputs.write_adapter(adapter, shapes)

    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)

    assert len(shapes) == 483
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.hidden_size == inputs.WIDTH_STEP
    assert len(list(base.glob("*.safetensors"))) == 3
    with open_checkpoint(str(base)) as opened, open_adapter(str(adapter), opened) as found:
        assert len(found.parameters) == 120
        assert opened.nbytes == inputs.nbytes(shapes)


def test_full_width_has_the_size_of_starcoder2_3b(tmp_path):
    assert inputs.nbytes(inputs.write_config(tmp_path, 1.0)) == 4 * 3_030_371_328


def measured(seconds: float) -> Measured:
    return Measured(seconds, peak=0, read_calls=0, read_disk=0, written=0, output="")


def test_the_limit_is_the_bytes_that_must_move_at_the_speed_of_cat_and_cp():
    """A base of 4 GB, read at 2 GB/s, copied to disk at 1 GB/s."""
    rows = [Row("read", "cat", measured(2.0), 0.0), Row("copy", "cp -r", measured(3.0), 1.0)]
    moves = {"merge": (4 * 10**9, 4 * 10**9), "extract": (8 * 10**9, 10**9)}

    result = WidthResult(1.0, 10**9, "fp32", measured(1.0), rows, moves, [])

    assert result.limit("merge") == pytest.approx(4.0)
    assert result.limit("extract") == pytest.approx(1.0 + 3.5)
    assert result.limit("copy") is None


def test_the_obvious_way_is_left_out_where_two_models_do_not_fit_in_memory(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark, "_memory", lambda: 1000)

    status = benchmark.main(["--width", str(TINY), "--steps", "merge", "--work_dir", str(tmp_path)])

    assert status == 0
    shown = capsys.readouterr()
    assert "| obvious |" not in shown.out
    assert "do not fit in memory" in shown.err


def test_refuses_before_it_writes_when_the_disk_is_too_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))

    assert benchmark.main(["--width", str(TINY), "--work_dir", str(tmp_path)]) == 2

    assert "are needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_finds_the_tensor_of_which_one_bit_differs(tmp_path):
    for name, value in (("one", 0.0), ("other", -0.0)):
        specs = [("same", torch.float32, (2, 3)), ("weight", torch.float32, (4, 3))]
        with TensorFileWriter(tmp_path / f"{name}.safetensors", specs) as writer:
            writer.write("weight", torch.full((1, 3), value), 3)

    paths = (tmp_path / "one.safetensors", tmp_path / "other.safetensors")

    assert list(benchmark.differing_tensors(*paths)) == ["weight"]
    assert list(benchmark.differing_tensors(paths[0], paths[0])) == []


def test_peak_memory_is_the_command_s_own(tmp_path):
    ballast = torch.ones(64 << 20)  # 256 MB in this process, none of which is the command's

    small = measure([sys.executable, "-c", "pass"], tmp_path)
    large = measure([sys.executable, "-c", "b'x' * 100_000_000"], tmp_path)

    assert ballast.nbytes > 200e6
    assert small.peak < 100e6
    assert 85e6 < large.peak - small.peak < 110e6


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count bytes")
def test_bytes_read_and_written_are_counted(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)

    moved = measure(["cp", "file", "copy"], tmp_path)

    assert moved.read_calls is not None and 3_000_000 <= moved.read_calls < 3_500_000


def test_a_failing_command_is_reported_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "import sys; print('bad luck', file=sys.stderr); sys.exit(3)"]

    with pytest.raises(CommandFailed, match="exit status 3: bad luck"):
        measure(command, tmp_path)


def test_ctrl_c_ends_the_command_that_is_being_measured(tmp_path):
    program = (  # which heeds Ctrl-C even where a shell has started all this in the background
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]);"
        "from benchmarks.measure import measure;"
        "child = 'import os, time, pathlib;"
        'pathlib.Path("pid").write_text(str(os.getpid())); time.sleep(60)\';'
        "measure([sys.executable, '-c', child], pathlib.Path(sys.argv[2]))"
    )
    root = str(Path(benchmark.__file__).parent.parent)
    run = subprocess.Popen(
        [sys.executable, "-c", program, root, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    pid_file = tmp_path / "pid"
    _wait(lambda: pid_file.exists() and pid_file.read_text())
    run.send_signal(2)
    run.wait(timeout=20)

    assert run.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_disagreement_is_named_and_is_exit_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "differing_tensors", lambda one, other: iter(["model.x"]))
    monkeypatch.setattr(
        benchmark, "_obvious", lambda step, *args: ["cp", "-r", "base", args[2]]
    )  # a way that merges nothing, so that no PEFT is imported

    status = benchmark.main(
        ["--width", str(TINY), "--steps", "merge", "--work_dir", str(tmp_path), "--quiet"]
    )

    assert status == 1
    assert "1 tensors differ, the first is model.x" in capsys.readouterr().out


def _wait(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_speed_of_intruders_is_given_for_any_shape_and_the_verdicts_compared(
    monkeypatch, capsys
):
    monkeypatch.setattr(intruder_speed, "REPEAT_SECONDS", 0.0)
    flags = ["--device", "cpu", "--sizes", "24", "60x90", "90x60"]
    assert intruder_speed.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["24 × 24", "60 × 90", "90 × 60"]
    assert all(line.split()[-1] == "yes" for line in lines[2:])

    monkeypatch.setattr(intruder_speed, "_dense_verdict", lambda left, tuned: [-1])
    assert intruder_speed.main(flags) == 1
    assert intruder_speed.main(["--sizes", "6x"]) == 2
