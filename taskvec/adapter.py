"""One or several PEFT adapters on disk, bound to the base that they will be merged into.

Coverage is what the tensors say, not ``target_modules``. What is not understood is refused by
name: nothing is merged by guess.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from taskvec.adapters.binding import bind
from taskvec.adapters.config import LoraConfig, read_config
from taskvec.adapters.files import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE
from taskvec.adapters.parts import LowRankPart, Part, ReplacementPart, TokensPart
from taskvec.checkpoint import Checkpoint, locate_adapter
from taskvec.cli import UserError
from taskvec.tensorfile import TensorFile
from taskvec.torchfile import TorchFile
from taskvec.update import Update
from taskvec.updates.in_turn import InTurn

Sources = str | Sequence[str]


@dataclass(frozen=True)
class Adapter:
    """Adapters opened for reading and bound to a base: parameter names are the base's.

    Attributes:
        paths: their directories, in the order in which they are merged.
        configs: their adapter_config.json.
        scalings: every parameter that they change, in the order of the base, with its s; None for
            what is not a product (a tensor that is replaced), or is one of several.
        files: configurations and weights.
        stored_elements, stored_bytes: size of all their tensors.
    """

    paths: list[Path]
    configs: list[LoraConfig]
    scalings: dict[str, float | None]
    files: list[Path]
    stored_elements: int
    stored_bytes: int
    _base: Checkpoint
    _parts: dict[str, list[Part]]

    @property
    def config(self) -> LoraConfig:
        """Of the first adapter."""
        return self.configs[0]

    @property
    def parameters(self) -> list[str]:
        """Names, in the base, of the parameters that the adapters change."""
        return list(self._parts)

    def is_low_rank(self, parameter: str) -> bool:
        """Whether a parameter's update is s * B @ A on a matrix, so that `update` is a `LowRank`.

        Then ``A`` (r, in), ``B`` (out, r), ``scaling`` and ``transposed`` are all there is to it,
        and no spectrum of it needs a large matrix.
        """
        part, *more = self._parts[parameter]
        plain = isinstance(part, LowRankPart) and part.magnitude is None and part.stored is None
        return plain and not more

    def update(self, parameter: str, device: torch.device) -> Update:
        """What the adapters do to one parameter, factors raised to fp32 on ``device``.

        Raises:
            UserError: a tensor holds NaN or infinity.
        """
        updates = [part.update(parameter, self._base, device) for part in self._parts[parameter]]
        return updates[0] if len(updates) == 1 else InTurn(parameter, tuple(updates))


@contextlib.contextmanager
def open_adapter(source: Sources, base: Checkpoint) -> Iterator[Adapter]:
    """Open one or several adapters and match them with the base they will be merged into.

    An adapter that separates the output head from the embedding that it is tied to makes the head
    a parameter of the base (`taskvec.ties.untie`).

    Args:
        source: directory or hub id of a PEFT LoRA adapter, or several, to be merged in turn.
        base: the base model.

    Raises:
        UserError: an adapter that is not understood, a factor without its partner, a module that
            the base has not got, shapes that do not fit (all named); a quantised base.

    Example:
        with open_checkpoint(b) as base, open_adapter(l, base) as adapter:
            for name in adapter.parameters:
                update = adapter.update(name, torch.device("cpu"))
                rows = update.delta(0, 10)   # (10, in) fp32
    """
    base.refuse_quantised()  # first: its packed weights would look like wrong shapes
    sources = [source] if isinstance(source, str) else list(source)
    paths = [locate_adapter(each) for each in sources]
    configs = [read_config(path) for path in paths]
    parts: dict[str, list[Part]] = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in paths]
        for file, config in zip(files, configs, strict=True):
            for name, found in bind(file, config, base).items():
                parts.setdefault(name, []).extend(found)
        for name, found in parts.items():
            _check_order(name, found)
        ordered = {name: parts[name] for name in base.tensors if name in parts}
        infos = [info for file in files for info in file.tensors.values()]
        yield Adapter(
            paths=paths,
            configs=configs,
            scalings={
                name: found[0].scaling if len(found) == 1 else None
                for name, found in ordered.items()
            },
            files=[
                path
                for directory, file in zip(paths, files, strict=True)
                for path in (directory / CONFIG_FILE, file.path)
            ],
            stored_elements=sum(info.elements for info in infos),
            stored_bytes=sum(info.nbytes for info in infos),
            _base=base,
            _parts=ordered,
        )


def open_weights(path: Path) -> TensorFile:
    """The weights in an adapter's directory, as PEFT would choose them.

    Raises:
        UserError: there are none, or they are damaged.
    """
    safe, pickled = path / WEIGHTS_FILE, path / PICKLED_FILE
    if safe.is_file():
        return TensorFile(safe)
    if pickled.is_file():
        return TorchFile(pickled)
    raise UserError(f"{path}: holds no {WEIGHTS_FILE}; PEFT's save_pretrained() writes one")


def _check_order(name: str, parts: Sequence[Part]) -> None:
    """Refuse what is not well defined when several adapters change one parameter.

    Raises:
        UserError: names the parameter and both files.
    """
    for before, part in itertools.pairwise(parts):
        replaced = isinstance(part, (ReplacementPart, TokensPart))
        if replaced or getattr(part, "magnitude", None) is not None:
            what = "replaces" if replaced else "rescales (DoRA)"
            raise UserError(
                f"{part.source.path}: {what} {name}, which {before.source.path} changes too: they "
                "do not add up; if the second was trained on the result of the first, merge the "
                "first, then the second onto that"
            )
