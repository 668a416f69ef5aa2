"""A run that is killed, interrupted, or let down by its disk or its inputs.

After each: nothing stands under an output's name that is not complete and correct, the inputs are
what they were, and the same command run again succeeds and leaves nothing but its output.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checks import names
from tests.faults import Commands

SCRIPTS = ("merge", "extract", "compare")
PROGRAMS = {
    "merge": "merge_lora",
    "extract": "extract_task_vectors",
    "compare": "compare_lora_task_vector",
    "validate": "final_validation",
}
# One line, and nothing else, for what the disk or the person did.
ONE_LINE = re.compile(r"[a-z_]+\.py: error: [^\n]+\n")
INTERRUPTED = "interrupted; nothing was left half-written\n"


@dataclass
class Place:
    """Inputs that may be damaged, and where the outputs go.

    Attributes:
        home: holds ``in/`` and, when something was written, ``out/``.
        references: what each script writes when nothing happens, by path below its output.
    """

    home: Path
    commands: Commands
    references: dict[str, dict[str, bytes]]

    def words(self, script: str) -> list[object]:
        base, lora = ["--base_model", "in/base"], ["--lora_path", "in/lora"]
        flags: dict[str, list[object]] = {
            "merge": [*base, *lora, "--precision", "fp16"],
            "extract": [*base, "--finetuned_model", "in/tuned"],
            "compare": [
                *(*base, *lora, "--task_vector_path", "in/vector", "--no-generate_plots"),
            ],
            "validate": [*base, *lora, "--precisions", "fp16", "--no-behaviour"],
        }
        return [*flags[script], "--output_dir", "out", "--device", "cpu"]

    def run(self, script, **options):
        return self.commands.run(PROGRAMS[script], *self.words(script), cwd=self.home, **options)

    def inputs(self):
        return contents(self.home / "in")

    def check_output(self, script):
        """What stands under the final name is complete and correct, if anything does."""
        if (self.home / "out").exists():
            assert contents(self.home / "out") == self.references[script]

    def check_second_run(self, script, inputs):
        assert self.inputs() == inputs
        again = self.run(script)
        assert again.status == 0, again.err
        assert contents(self.home / "out") == self.references[script]
        assert names(self.home) == ["in", "out"]
        assert self.inputs() == inputs
        shutil.rmtree(self.home / "out")


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of flushes take long on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory).resolve()


@pytest.fixture(scope="module")
def prepared(commands, tiny, llama_lora, room) -> Place:
    """Every script has run once, undisturbed."""
    home = room / "prepared"
    shutil.copytree(tiny.base("llama", max_shard_size="30KB"), home / "in" / "base")
    shutil.copytree(llama_lora, home / "in" / "lora")
    place = Place(home, commands, {})
    keep = {"merge": "tuned", "extract": "vector", "compare": None}
    for script, kept in keep.items():
        done = place.run(script)
        assert done.status == 0, done.err
        place.references[script] = contents(home / "out")
        if kept:
            shutil.copytree(home / "out", home / "in" / kept)  # without holes, as every copy
            shutil.rmtree(home / "out")
    shutil.rmtree(home / "out")
    return place


@pytest.fixture
def place(prepared, room):
    home = room / "place"
    shutil.copytree(prepared.home / "in", home / "in")
    yield Place(home, prepared.commands, prepared.references)
    shutil.rmtree(home)


def spread(count, most):
    """At most so many of the numbers below ``count``, evenly spaced, with the last."""
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


# -- killed --------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_before_any_change_of_the_disk(script, place):
    """Every write, flush, rename and removal of the run is the last one that does not happen."""
    calls = place.run(script, count="changes").calls
    place.check_second_run(script, inputs := place.inputs())
    assert calls > 35
    for at in range(calls):
        killed = place.run(script, count="changes", at=at)
        assert killed.status == -signal.SIGKILL
        place.check_output(script)
        place.check_second_run(script, inputs)


def test_killed_while_an_earlier_output_is_replaced(place):
    """There is an output under the name at every moment: the earlier one, then the new one."""
    assert place.run("merge").status == 0
    (place.home / "out" / "config.json").write_text("earlier")
    shutil.move(place.home / "out", place.home / "earlier")
    earlier = contents(place.home / "earlier")
    shutil.copytree(place.home / "earlier", place.home / "out")
    calls = place.run("merge", count="changes").calls
    for at in range(calls // 2, calls):
        shutil.rmtree(place.home / "out")
        shutil.copytree(place.home / "earlier", place.home / "out")
        assert place.run("merge", count="changes", at=at).status == -signal.SIGKILL
        found = contents(place.home / "out")
        assert found in (earlier, place.references["merge"])
        assert place.run("merge").status == 0
        assert contents(place.home / "out") == place.references["merge"]
        assert names(place.home) == ["earlier", "in", "out"]


def test_the_whole_chain_killed_at_any_stage(place):
    inputs = place.inputs()
    calls = place.run("validate", count="changes").calls
    reference = contents(place.home / "out")
    for at in spread(calls, 4)[1:]:
        shutil.rmtree(place.home / "out")
        assert place.run("validate", count="changes", at=at).status == -signal.SIGKILL
        found = contents(place.home / "out") if (place.home / "out").exists() else {}
        for name, content in found.items():
            if ".partial" not in name:
                assert content == reference[name], name
        assert place.inputs() == inputs
        assert place.run("validate").status == 0
        assert contents(place.home / "out") == reference
        assert names(place.home) == ["in", "out"]


# -- interrupted ---------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_at_any_time(script, place):
    inputs = place.inputs()
    calls = place.run(script, count="all").calls
    place.check_second_run(script, inputs)
    for at in spread(calls, 40):
        stopped = place.run(script, count="all", at=at, act="interrupt")
        if "in build_parser" in stopped.err:  # too early: Python's own start, and its traceback
            continue
        if stopped.status == 0:  # too late: everything was done
            assert contents(place.home / "out") == place.references[script]
        else:
            assert (stopped.status, stopped.err) == (130, INTERRUPTED)
            place.check_output(script)
        assert set(names(place.home)) <= {"in", "out"}
        place.check_second_run(script, inputs)


# -- the disk ------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("largest", [0, 100, 1500, 4000])
def test_files_that_may_not_grow(script, largest, place):
    """A limit on the size of files: what a quota or an old file system does."""
    inputs = place.inputs()
    failed = place.run(script, largest_file=largest)
    assert failed.status == 2
    assert ONE_LINE.fullmatch(failed.err), failed.err
    assert re.search(r"File too large: .*out", failed.err)
    assert names(place.home) == ["in"]
    place.check_second_run(script, inputs)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB below the test's directory."""
    mounted: list[Path] = []

    def mount(kib, *options):
        target = tmp_path / f"disk-{len(mounted)}"
        target.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kib}k", *options]), "small"]
        try:
            done = subprocess.run([*command, str(target)], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode:
            pytest.skip(f"file systems may not be mounted here: {done.stderr.strip()}")
        mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk(script, place, small_disk):
    size = sum(map(len, place.references[script].values()))
    for kib in (0, size // 4096, size // 2048):
        disk = small_disk(max(4, kib))
        words = [*place.words(script), "--output_dir", disk / "out"]
        failed = place.commands.run(PROGRAMS[script], *words, cwd=place.home)
        assert failed.status == 2
        assert ONE_LINE.fullmatch(failed.err), failed.err
        assert re.search(rf"No space left on device: {disk}", failed.err)
        assert names(disk) == []
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert place.commands.run(PROGRAMS[script], *words, cwd=place.home).status == 0
        assert contents(disk / "out") == place.references[script]


@pytest.mark.parametrize("script", [*SCRIPTS, "validate"])
def test_a_directory_that_may_not_be_written_to(script, place):
    locked = place.home / "locked"
    locked.mkdir(mode=0o555)
    words = [*place.words(script), "--output_dir", "locked/deep/out"]
    refused = place.commands.run(PROGRAMS[script], *words, cwd=place.home, no_privileges=True)
    assert refused.status == 2
    assert ONE_LINE.fullmatch(refused.err), refused.err
    assert "Permission denied: " in refused.err
    assert names(locked) == []
    locked.chmod(0o755)
    again = place.commands.run(PROGRAMS[script], *words, cwd=place.home, no_privileges=True)
    assert again.status == 0, again.err


# -- the inputs ----------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_inputs_that_may_only_be_read(script, place):
    """Files and directories without write permission do, and so do the outputs they give."""
    inputs = [place.home / "in", *(place.home / "in").rglob("*")]
    for path in inputs:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for _ in range(2):  # the second replaces the output of the first
            assert place.run(script, no_privileges=True).status == 0
            assert contents(place.home / "out") == place.references[script]
    finally:
        for path in inputs:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_an_input_that_may_not_be_read(place):
    file = place.home / "in" / "lora" / "adapter_model.safetensors"
    file.chmod(0)
    refused = place.run("merge", no_privileges=True)
    assert refused.status == 2
    assert ONE_LINE.fullmatch(refused.err), refused.err
    assert "Permission denied: in/lora/adapter_model.safetensors" in refused.err
    assert names(place.home) == ["in"]


SHRINKING = [
    ("merge", "in/base/{shard}"),
    ("merge", "in/lora/adapter_model.safetensors"),
    ("extract", "in/tuned/{shard}"),
    ("compare", "in/vector/task_vector.safetensors"),
    ("compare", "in/base/{shard}"),
]


@pytest.mark.parametrize(("script", "name"), SHRINKING)
def test_an_input_that_shrinks_while_it_is_read(script, name, place):
    shard = sorted((place.home / "in" / "base").glob("model-*"))[0].name
    file = (place.home / name.format(shard=shard)).resolve()
    whole = file.read_bytes()
    calls = place.run(script, count="reads", file=file).calls
    place.check_second_run(script, inputs := place.inputs())
    assert calls > 2
    for at in spread(calls, 12):
        found = place.run(script, count="reads", at=at, act="shrink", file=file)
        assert found.status in (0, 2)  # 0: nothing more was to be read of what is gone
        if found.status == 2:
            assert ONE_LINE.fullmatch(found.err), found.err
            assert file.name in found.err
            assert names(place.home) == ["in"]
        place.check_output(script)
        file.write_bytes(whole)
        place.check_second_run(script, inputs)
