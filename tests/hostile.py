"""Small inputs that a fuzzer may spoil, and what must be true of a command that reads them.

`Sandbox` holds a base, an adapter and a task vector of a few elements each. `Sandbox.run` drives a
script's ``main`` in this process and checks what holds for any input whatever: an exit status that
is documented, one printable line where the input is refused, a bound on the time, and no file
touched but the output.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Cases in an ordinary run are what each test says; `FUZZ_FACTOR=20` runs so many times as many,
# and other ones each time.
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
SECONDS = 20  # of the processor for one case, hundreds of times what any takes
LONGEST_LINE = 2000

PREFIX = "base_model.model."
BASE: dict[str, Any] = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(4, 3) / 8,
    "b.weight": np.array([1.5, -2.0, 0.25], dtype=np.float16),
    "ids": np.array([3, 1], dtype=np.int64),
}
A = np.array([[1, -2, 3], [0.5, 0.25, -1]], dtype=np.float32)
B = np.array([[1, 0], [0, 2], [-1, 1], [3, 0.5]], dtype=np.float32)
LORA: dict[str, Any] = {f"{PREFIX}a.lora_A.weight": A, f"{PREFIX}a.lora_B.weight": B}
VECTOR: dict[str, Any] = {"a.weight": np.float32(2) * (B @ A), "b.weight": np.zeros(3, np.float32)}
LORA_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
CONFIG: dict[str, Any] = {"architectures": ["TinyForCausalLM"], "dtype": "float32"}

_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}

Header = dict[str, Any]


def cases(count: int) -> settings:
    """So many examples, times FUZZ_FACTOR; the same ones in every ordinary run."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def header_and_data(tensors: dict[str, Any]) -> tuple[Header, bytes]:
    """A safetensors header, as a dict, and the bytes that follow it."""
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    return header, data


def file_bytes(header: Header | bytes, data: bytes) -> bytes:
    """A safetensors file of a header, as a dict or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {
    "base/model.safetensors": file_bytes(*header_and_data(BASE)),
    "base/config.json": json.dumps(CONFIG).encode(),
    "lora/adapter_model.safetensors": file_bytes(*header_and_data(LORA)),
    "lora/adapter_config.json": json.dumps(LORA_CONFIG).encode(),
    "vector/task_vector.safetensors": file_bytes(*header_and_data(VECTOR)),
    "text/a.txt": b"what a model is trained on " * 20,
    "outside.safetensors": file_bytes(*header_and_data(BASE)),
}


@dataclass(frozen=True)
class Ending:
    """What a command said and returned."""

    status: int
    out: str
    err: str


class Sandbox:
    """A directory with sound inputs and a place for outputs.

    Attributes:
        home: holds base/, lora/, vector/, a file that nobody names, and perhaps out/.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.out = home, home / "out"
        self.restore()

    def restore(self) -> None:
        """The inputs as they were, and nothing else."""
        shutil.rmtree(self.home, ignore_errors=True)
        for name, content in GOOD.items():
            self.put(name, content)

    def put(self, name: str, content: bytes) -> Path:
        """Write a file below the directory."""
        file = self.home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    @contextlib.contextmanager
    def with_file(self, name: str, content: bytes) -> Iterator[None]:
        """Another content for one input while the block runs."""
        file = self.put(name, content)
        try:
            yield
        finally:
            if name in GOOD:
                file.write_bytes(GOOD[name])
            else:
                file.unlink()

    def words(self, script: str) -> list[str]:
        """The flags with which a script reads these inputs."""
        base = ["--base_model", str(self.home / "base")]
        lora = ["--lora_path", str(self.home / "lora")]
        vector = ["--task_vector_path", str(self.home / "vector")]
        output = ["--output_dir", str(self.out)]
        cpu = ["--device", "cpu"]
        flags = {
            "merge_lora": [*base, *lora, *cpu],
            "extract_task_vectors": [
                *(*base, "--finetuned_model", str(self.home / "base" / "model.safetensors"), *cpu)
            ],
            "compare_lora_task_vector": [*base, *lora, *vector, *cpu, "--no-generate_plots"],
            "debug_lora_structure": [*base, *lora],
            "visualize_model_structure": [*base, *lora],
            "investigate_parameter_changes": [*base, *lora, *vector, *cpu],
            "analyze_task_vector_structure": [*vector, *cpu],
            "quick_precision_test": [*base, *lora, *cpu],
            "analyze_lora_vs_task_vector_math": [
                *("--lora_file", str(self.home / "vector" / "task_vector.safetensors")),
                *("--task_vector_file", str(self.home / "vector"), *base, *cpu),
            ],
            "find_intruder_dimensions": [*base, *lora, "--cache_dir", "none", *cpu],
            "finetune_lora": [*base, "--text", str(self.home / "text"), *cpu],
            "final_validation": [*base, *lora, *cpu, "--quiet"],
            "analyze_task_vectors show": ["show", vector[1], *cpu],
            "analyze_task_vectors apply": ["apply", *base, "--task_vector", vector[1], *cpu],
            "analyze_task_vectors to_lora": [
                *("to_lora", *base, *lora, "--task_vector", vector[1], *cpu)
            ],
            "analyze_task_vectors analogy": ["analogy", vector[1], vector[1], vector[1], *cpu],
        }
        for command in ("add", "negate", "scale", "ties", "dare_linear", "dare_ties"):
            flags[f"analyze_task_vectors {command}"] = [command, vector[1], *cpu]
        return [*flags[script], *output]

    def run(self, script: str, *more: str) -> Ending:
        """Run a script on these inputs; whatever they hold, the checks of this module hold."""
        self.clear()
        before = self.contents()
        ending = run_main(main_of(script), [*self.words(script), *more])
        assert self.contents() == before
        if ending.status == 2:
            assert not self.out.exists()
        return ending

    def clear(self) -> None:
        """Remove the output."""
        shutil.rmtree(self.out, ignore_errors=True)

    def contents(self) -> dict[str, bytes | None]:
        """Every path but the output's and, for a file, its content."""
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in self.home.rglob("*")
            if self.out not in (path, *path.parents)
        }


def main_of(script: str) -> Callable[[list[str]], int]:
    """The ``main`` of a script, or of a script and a command of it."""
    main: Callable[[list[str]], int] = importlib.import_module(script.split()[0]).main
    return main


def run_main(main: Callable[[list[str]], int], words: list[str]) -> Ending:
    """Run a ``main`` in this process and check how it ends."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _time_limit():
        status = main(words)
    ending = Ending(status, out.getvalue(), err.getvalue())
    assert status in (0, 1, 2), ending
    for text in (ending.out, ending.err):
        assert all(character.isprintable() or character in "\n\xa0\u2009" for character in text)
    if status == 2:
        assert ending.out == ""
        assert ending.err.count("\n") == 1 and ": error: " in ending.err, ending.err
        assert len(ending.err) < LONGEST_LINE
    else:
        assert "error" not in ending.err and "Traceback" not in ending.err, ending.err
    return ending


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Fail a case that takes too long of the processor."""

    def stop(*_: object) -> None:
        raise AssertionError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# -- what a fuzzer puts into files ----------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63)]),
    st.sampled_from([10**30, 10**400, 1e308, 5e-324, float("nan"), float("inf"), -0.0, 0.5]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            *("", ".", "..", "/", "a\0b", "\x1b[31mred", "a\nb", "\u202e", "\ud800", "ü", "🏗️"),
            *("../outside.safetensors", "/etc/passwd", "model.safetensors", "a.weight"),
            *("F32", "f32", "BF16", "F8_E4M3", "F4", "float32", "LORA", "x" * 300),
        ]
    ),
)
SCALARS = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def nested(depth: int, kind: str) -> str:
    """JSON of so many lists or objects within each other."""
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few of them changed, cut out, doubled or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["change", "cut", "double", "insert", "truncate"]))
        length = draw(st.integers(1, 8))
        if kind == "change" and at < len(found):
            found[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "double":
            found[at:at] = found[at : at + length]
        elif kind == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "truncate":
            del found[at:]
    return bytes(found)


@st.composite
def spoilt_json(draw: st.DrawFn, content: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A JSON value with some of what it holds replaced, removed or added, at any depth."""
    found = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _pick(draw, found)
        if holder is None:
            return draw(values)
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del holder[key]
        elif kind == "replace":
            holder[key] = draw(values)
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(values)
        else:
            holder.append(draw(values))
    return found


def _pick(draw: st.DrawFn, content: Any) -> tuple[Any, Any]:
    """Somewhere within a JSON value: what holds it, and under which key."""
    holder, key = None, None
    while isinstance(content, (dict, list)) and content:
        if holder is not None and draw(st.booleans()):
            break
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        holder, key = content, draw(st.sampled_from(keys))
        content = holder[key]
    return holder, key


def json_bytes(value: Any) -> bytes:
    """JSON as Python writes it: with NaN, and with halves of surrogate pairs as escapes."""
    return json.dumps(value).encode()
