"""Outputs appear under their names only when complete and on disk, and never on top of an input."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taskvec import output
from taskvec.cli import UserError
from taskvec.output import output_directory, output_file, write_json
from tests.checks import names

OURS = ["a.txt", "b.txt"]


def write_output(target, content="new", files=("a.txt",), **options):
    with output_directory(target, options.pop("is_ours", OURS), **options) as partial:
        for file in files:
            (partial / file).write_text(content)


def test_nothing_stands_under_the_name_until_the_block_has_ended(tmp_path):
    target = tmp_path / "out"
    with output_directory(target, OURS) as partial:
        (partial / "a.txt").write_text("new")
        assert not target.exists()
    assert names(tmp_path) == ["out"]
    assert (target / "a.txt").read_text() == "new"


def test_missing_parents_are_made(tmp_path):
    write_output(tmp_path / "deep" / "er" / "out")
    assert names(tmp_path / "deep" / "er") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with output_directory(tmp_path / "out", OURS) as partial:
            (partial / "a.txt").write_text("half")
            raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_the_earlier_output_as_it_was(tmp_path):
    write_output(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        with output_directory(tmp_path / "out", OURS) as partial:
            (partial / "a.txt").write_text("half")
            raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_new_output_replaces_the_earlier_one_as_a_whole(tmp_path):
    write_output(tmp_path / "out", "old", files=["a.txt", "b.txt"])
    write_output(tmp_path / "out", "new", files=["a.txt"])
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


def test_without_an_exchange_of_names_a_new_output_replaces_the_earlier_one_too(
    tmp_path, monkeypatch
):
    write_output(tmp_path / "out", "old", files=["a.txt", "b.txt"])
    monkeypatch.setattr(output, "_renameat2", None)
    write_output(tmp_path / "out", "new", files=["a.txt"])
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a.txt"]


def test_parents_that_were_made_for_a_failure_are_taken_away_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for write in (lambda path: output_directory(path, OURS), output_file):
        with pytest.raises(RuntimeError):
            with write(tmp_path / "mine" / "deep" / "er" / "out"):
                raise RuntimeError
        assert names(tmp_path / "mine") == []


def test_an_error_of_the_disk_names_what_was_being_written(tmp_path):
    for write in (lambda path: output_directory(path, OURS), output_file):
        with pytest.raises(OSError) as caught:
            with write(tmp_path / "out"):
                raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.filename == str(tmp_path / "out")


def test_a_directory_under_the_name_of_an_output_is_not_destroyed(tmp_path):
    (tmp_path / "out" / "a.txt").mkdir(parents=True)
    (tmp_path / "out" / "a.txt" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds a\.txt"):
        write_output(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt" / "thesis.tex").exists()


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write_output(tmp_path / "out")
    assert names(tmp_path / "out") == ["a.txt"]


@pytest.mark.parametrize("is_ours", [OURS, lambda directory: False], ids=["names", "a test"])
def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path, is_ours):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a.txt").write_text("mine")
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"out: holds .*not an output of this script.*--output_dir"):
        write_output(target, is_ours=is_ours)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["a.txt", "thesis.tex"]
    assert (target / "a.txt").read_text() == "mine"


def test_files_that_appear_while_the_output_is_made_are_not_destroyed(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        with output_directory(target, OURS) as partial:
            (partial / "a.txt").write_text("new")
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")
    assert names(tmp_path) == ["out"]
    assert (target / "thesis.tex").read_text() == "years of work"


def test_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out: is a file"):
        write_output(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("where", ["model", "model/merged", ".", "link", "link/merged"])
def test_an_output_on_in_or_around_an_input_is_refused(tmp_path, where):
    model = tmp_path / "home" / "model"
    model.mkdir(parents=True)
    (model / "a.txt").write_text("input")
    (tmp_path / "home" / "link").symlink_to(model)
    with pytest.raises(UserError, match="is, holds or lies inside the input"):
        write_output(tmp_path / "home" / where, inputs=[model])
    assert (model / "a.txt").read_text() == "input"
    assert names(model) == ["a.txt"]
    assert names(tmp_path / "home") == ["link", "model"]


def test_an_input_that_is_a_link_to_the_output_is_recognised(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UserError, match="the input"):
        write_output(model, inputs=[tmp_path / "link"])


def test_an_output_beside_an_input_file_is_fine(tmp_path):
    (tmp_path / "model.safetensors").write_text("input")
    write_output(tmp_path / "out", inputs=[tmp_path / "model.safetensors"])
    assert names(tmp_path) == ["model.safetensors", "out"]


def test_an_output_that_is_a_link_goes_where_the_link_points(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write_output(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from taskvec.output import output_directory
with output_directory(Path(sys.argv[1]), ["a.txt"]) as partial:
    (partial / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".out.partial"]
    write_output(tmp_path / "out", files=["b.txt"])
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["b.txt"]


def test_two_runs_cannot_write_the_same_output_at_once(tmp_path):
    with output_directory(tmp_path / "out", OURS) as partial:
        (partial / "a.txt").write_text("first")
        with pytest.raises(UserError, match=r"\.out\.partial: another run is writing it"):
            write_output(tmp_path / "out", "second")
        (partial / "b.txt").write_text("first")
    assert names(tmp_path) == ["out"]
    assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {"first"}


def test_two_runs_may_write_two_outputs_in_one_directory_at_once(tmp_path):
    with output_directory(tmp_path / "one", OURS) as partial:
        write_output(tmp_path / "two")
        write_output(partial / "within", is_ours=OURS)
    assert names(tmp_path) == ["one", "two"]
    assert names(tmp_path / "one") == ["within"]


def test_a_rename_that_fails_brings_the_earlier_output_back(tmp_path, monkeypatch):
    write_output(tmp_path / "out", "old")
    rename = Path.rename

    def fail_at_the_last_step(self, target):
        if self.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(output, "_renameat2", None)  # a system without the exchange
    monkeypatch.setattr(Path, "rename", fail_at_the_last_step)
    with pytest.raises(OSError, match="Input/output error"):
        write_output(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_disk_that_cannot_take_the_data_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_output(tmp_path / "out")
    assert names(tmp_path) == []


def test_every_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(fd):
        events.append(os.fstat(fd).st_ino)
        fsync(fd)

    def record_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    write_output(tmp_path / "out", files=OURS)
    flushed = set(events[: events.index("rename")])
    assert flushed >= {(tmp_path / "out" / name).stat().st_ino for name in OURS}
    assert (tmp_path / "out").stat().st_ino in flushed
    assert tmp_path.stat().st_ino in events[events.index("rename") :]  # the new name itself


def test_json_holds_no_nan_or_infinity_and_keeps_its_letters(tmp_path):
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "x.json", {"a": [bad]})
    assert names(tmp_path) == []
    write_json(tmp_path / "x.json", {"größe": 1.5, "list": [1, None]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "größe" in text and text.endswith("}\n")
    assert json.loads(text) == {"größe": 1.5, "list": [1, None]}


def test_a_single_file_replaces_its_target_only_when_complete(tmp_path):
    target = tmp_path / "new" / "figure.png"
    with output_file(target) as partial:
        partial.write_text("first")
        assert partial.suffix == ".png"  # matplotlib takes the format from it
        assert not target.exists()
    with pytest.raises(RuntimeError):
        with output_file(target) as partial:
            partial.write_text("half")
            raise RuntimeError
    assert names(target.parent) == ["figure.png"]
    assert target.read_text() == "first"


def test_a_test_of_an_earlier_output_may_know_directories_too(tmp_path):
    """Names alone are those of files: a directory under one of them is somebody else's."""
    target = tmp_path / "out"
    (target / "a.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out: holds a\.txt, which is not an output"):
        write_output(target)
    write_output(target, is_ours=lambda directory: (directory / "a.txt").is_dir())
    assert (target / "a.txt").is_file()
