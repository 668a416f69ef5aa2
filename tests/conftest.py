"""Every test runs without a network and without other people's model caches.

The small models and adapters are made once per session and are read-only: a test that damages one
takes a copy (`copied`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by the Hugging Face libraries when they are imported, so it is set before anything else is.
_HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
# Small tensors gain nothing from threads, and on a busy machine waiting for them costs most.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HOME=_HF_HOME.name,
    XDG_CACHE_HOME=_HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)


def pytest_configure(config: pytest.Config) -> None:
    for warning in ("FutureWarning:transformers", "UserWarning:peft", "RuntimeWarning:peft"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}")


@pytest.fixture(scope="session", autouse=True)
def _hf_home() -> Iterator[None]:
    yield
    _HF_HOME.cleanup()


@pytest.fixture(autouse=True)
def _not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--quiet`` of one test must not silence the next."""
    from taskvec import cli

    monkeypatch.setattr(cli, "_quiet", False)


class TinyModels:
    """Small models and adapters by their settings, each made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, Path] = {}

    def base(self, family: str = "llama", **settings: Any) -> Path:
        """A directory of `tests.models.make_base`."""
        from tests.models import make_base

        def make(directory: Path) -> Path:
            return make_base(directory, family, **settings)

        return self.once(f"base {family} {settings}", make)

    def adapter(self, base: Path, **settings: Any) -> Path:
        """A directory of `tests.models.make_adapter`."""
        from tests.models import make_adapter

        return self.once(
            f"adapter {base} {settings}", lambda to: make_adapter(to, base, **settings)
        )

    def once(self, key: str, make: Callable[[Path], Path]) -> Path:
        if key not in self._made:
            self._made[key] = make(self._directory / f"{len(self._made):03d}")
        return self._made[key]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llama(tiny: TinyModels) -> Path:
    """A small Llama in fp32."""
    return tiny.base("llama")


@pytest.fixture(scope="session")
def llama_lora(tiny: TinyModels, llama: Path) -> Path:
    """A LoRA of that Llama: r = 4, alpha = 8, on six modules."""
    return tiny.adapter(llama)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a directory that a test may damage."""

    def copy(source: Path) -> Path:
        target = tmp_path / f"copy-of-{source.name}"
        shutil.copytree(source, target)
        return target

    return copy


@pytest.fixture
def hub() -> Callable[..., str]:
    """Puts a directory into the session's Hugging Face cache, as a download would; returns the id.

    The layout is the hub client's own: blobs by hash, a snapshot of links to them, a ref.
    """

    def put(source: Path, hub_id: str, commit: str, ref: str = "main") -> str:
        repository = Path(os.environ["HF_HOME"], "hub", "models--" + hub_id.replace("/", "--"))
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        for directory in (snapshot, blobs, repository / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            blob = blobs / f"{commit}-{file.name}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        (repository / "refs" / ref).write_text(commit)
        return hub_id

    return put


@pytest.fixture
def lab(tmp_path: Path, tiny: TinyModels) -> Callable[..., Any]:
    """Labs for one test: lab(family, precision, ...)."""
    from tests.lab import Lab

    def make(*args: Any, **settings: Any) -> Lab:
        path = tmp_path / f"lab{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        return Lab(path, tiny, *args, **settings)

    return make


@pytest.fixture(scope="session")
def commands() -> Iterator[Any]:
    """Runs commands in processes that are limited or disturbed (`tests.faults.Commands`)."""
    from tests import system_calls
    from tests.faults import Commands

    if reason := system_calls.why_not():
        pytest.skip(reason)
    with Commands() as server:
        yield server
