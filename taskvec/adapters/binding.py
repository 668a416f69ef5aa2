"""Which parameter of a base each part of an adapter belongs to, with every shape checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.keys import BIAS, MAGNITUDE, TOKENS, A, B, Group, grouped_keys
from taskvec.adapters.parts import (
    BiasPart,
    ExpertPart,
    ExpertsPart,
    LowRankPart,
    Part,
    ReplacementPart,
    TokensPart,
)
from taskvec.adapters.places import Places
from taskvec.adapters.promises import (
    check_promises,
    check_saved,
    checked_magnitude,
    checked_scaling,
)
from taskvec.adapters.ties import settle_ties
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.names import Piece, resizing
from taskvec.tensorfile import TensorFile, row_blocks
from taskvec.ties import tied_to

_COMPARED_ELEMENTS = 1 << 20


def bind(file: TensorFile, config: LoraConfig, base: Checkpoint) -> dict[str, list[Part]]:
    """What an adapter does to each parameter of a base, by the base's names.

    Raises:
        UserError: a tensor that is not understood, a factor without its partner, a parameter that
            the base has not got, a shape that does not fit; each is named.
    """
    groups, whole = grouped_keys(file)
    check_promises(file, config, groups, whole)
    binding = _Binding(file, config, base, groups, whole)
    binding.check_saved(whole)
    for group in groups:
        binding.add_group(group)
    for name, info in whole.items():
        binding.add_whole(name, info)
    return binding.finished()


class _Binding:
    """Collects an adapter's parts by parameter.

    Attributes:
        parts: what has been found.
        places: the base, by the names that the adapter has for its parameters.
    """

    def __init__(
        self,
        file: TensorFile,
        config: LoraConfig,
        base: Checkpoint,
        groups: Sequence[Group],
        whole: dict[str, TensorInfo],
    ) -> None:
        self.file, self.config, self.base = file, config, base
        self.parts: dict[str, list[Part]] = {}
        own = [
            group.module
            for group in groups
            if not config.parameters_of(group.module)
            and not tied_to(base, f"{group.module}.weight")
        ]
        named = [name for group in groups for name in config.parameters_of(group.module)]
        self.places = Places(file.path, base, own, named)
        settle_ties(file, config, base, groups, whole, self.places.rename)
        self._squares: list[tuple[str, LowRankPart]] = []
        self._shown: dict[str, bool] = {}

    # -- one wrapper of one module ---------------------------------------------------

    def add_group(self, group: Group) -> None:
        tensors = group.tensors
        if not tensors:  # a twin that was left out
            return
        if TOKENS in tensors:
            self._add_tokens(group)
            return
        if A not in tensors or B not in tensors:
            present, missing = (A, B) if A in tensors else (B, A)
            raise UserError(
                f"{self.file.path}: {group.module} has lora_{present} but no lora_{missing}"
                if present in tensors
                else f"{self.file.path}: {group.module} has a {next(iter(tensors))} but no factors"
            )
        for info in (tensors[A], tensors[B]):
            if len(info.shape) < 2:
                raise UserError(
                    f"{info.path}: {info.name}: {info.dtype} {info.shape} is no LoRA factor"
                )
        named = self.config.parameters_of(group.module)
        if named:
            self._add_to_parameter(group, named)
        else:
            self._add_to_module(group)

    def _add_to_module(self, group: Group) -> None:
        """LoRA on a linear layer, GPT-2's Conv1D, an embedding or a convolution."""
        name, info = self.places.find(f"{group.module}.weight", group.module)
        scaling = checked_scaling(self.file, self.config, group, group.module, 1)
        factors = group.tensors[A], group.tensors[B]
        magnitude = checked_magnitude(self.file, self.config, group)
        part = LowRankPart(
            self.file,
            *factors,
            scaling,
            transposed=group.embedding,
            rounds_delta=group.embedding or self.config.rounds_delta or self.places.is_fused(name),
            magnitude=magnitude,
        )
        if len(info.shape) > 2:
            self.places.check_convolution(group, name, info)
            part = dataclasses.replace(part, stored=info.shape)
        elif any(len(factor.shape) != 2 for factor in factors):
            raise UserError(
                f"{self.file.path}: {group.module}: lora_A {factors[0].shape} and lora_B "
                f"{factors[1].shape} are no factors of a matrix, as {name} in {self.base.source} is"
            )
        elif group.embedding:
            self.places.check_shape(group, name, info, (factors[0].shape[1], factors[1].shape[0]))
        else:
            out, into = factors[1].shape[0], factors[0].shape[1]
            if info.shape not in ((out, into), (into, out)):
                self.places.refuse_shape(group, name, info, (out, into))
            if out == into:
                self._squares.append((name, part))
                self._add(name, part)
                self._add_bias(group, scaling)
                return
            self._shown[name] = info.shape == (into, out)
            part = dataclasses.replace(part, transposed=self._shown[name])
        self._add(name, part)
        self._add_bias(group, scaling)

    def _add_to_parameter(self, group: Group, named: Sequence[str]) -> None:
        """LoRA on a parameter that target_parameters names: a matrix, or a stack of them."""
        fits = [name for name in named if self.places.fits(group, self.places.rename(name))]
        missing = [name for name in named if self.places.shape(name) is None]
        if len(missing) == len(named):
            raise UserError(
                f"{self.file.path}: adapts {' and '.join(named)}, which {self.base.source} has not "
                "got"
            )
        if len(fits) != 1:
            shapes = f"lora_A {group.tensors[A].shape} and lora_B {group.tensors[B].shape}"
            choice = " and ".join(f"{n} {self.places.shape(n)}" for n in fits or named)
            raise UserError(
                f"{self.file.path}: {group.module}: {shapes} fit "
                f"{'both' if fits else 'none of'} {choice}, so it is not known what they adapt"
            )
        if apart := self.places.pieces.get(self.places.rename(fits[0])):
            self._add_to_pieces(group, fits[0], apart)
            return
        name, info = self.places.find(fits[0], fits[0])
        experts = info.shape[0] if len(info.shape) == 3 else 1
        scaling = checked_scaling(self.file, self.config, group, fits[0], experts)
        self._refuse_extras(group, fits[0])
        factors = group.tensors[A], group.tensors[B]
        if experts == 1:
            stored = info.shape if len(info.shape) == 3 else None
            part: Part = LowRankPart(self.file, *factors, scaling, False, stored, rounds_delta=True)
        else:
            transposed = self.places.is_transposed(group, name, info)
            part = ExpertsPart(self.file, *factors, scaling, experts, transposed)
        self._add(name, part)

    def _add_to_pieces(self, group: Group, parameter: str, apart: Sequence[Piece]) -> None:
        """LoRA on experts that are fused in memory, and lie one by one in the base's file."""
        experts = len(apart) // apart[0].parts
        scaling = checked_scaling(self.file, self.config, group, parameter, experts)
        self._refuse_extras(group, parameter)
        factors = group.tensors[A], group.tensors[B]
        whole = ExpertsPart(self.file, *factors, scaling, experts, transposed=False)
        for piece in apart:
            name, info = self.places.find(piece.name, piece.name)
            rows, columns = factors[1].shape[0] // piece.parts, factors[0].shape[1]
            self.places.check_shape(group, name, info, (rows, columns))
            self._add(name, ExpertPart(whole, piece))

    def _refuse_extras(self, group: Group, parameter: str) -> None:
        if BIAS in group.tensors or MAGNITUDE in group.tensors:
            raise UserError(
                f"{self.file.path}: {parameter}: PEFT has no bias or DoRA for parameters"
            )

    def _add_tokens(self, group: Group) -> None:
        """Rows of an embedding, or of the head."""
        rows = group.tensors.pop(TOKENS)
        if group.tensors:
            raise UserError(f"{self.file.path}: {group.module} has both LoRA and trainable tokens")
        name, info = self.places.find(f"{group.module}.weight", group.module)
        tokens = self.config.tokens(group.module)
        if (len(tokens), *info.shape[1:]) != rows.shape:
            raise UserError(
                f"{self.file.path}: {group.module}: rows {rows.shape} do not fit the "
                f"{len(tokens)} token indices of {self.config.file.name} and {info.shape} in "
                f"{self.base.source}"
            )
        beyond = [token for token in tokens if token >= info.shape[0]]
        if beyond:
            raise UserError(
                f"{self.config.file}: token {beyond[0]} is beyond the {info.shape[0]} of {name}; "
                "resize the base as it was for training and save it first"
            )
        self._add(name, TokensPart(self.file, rows, tokens))

    def _add_bias(self, group: Group, scaling: float) -> None:
        """lora_bias: the bias of lora_B is added to the module's own."""
        bias, wanted = group.tensors.get(BIAS), bool(self.config.values.get("lora_bias"))
        if (bias is not None) != (wanted and not group.embedding):
            has = "no lora_B.bias" if bias is None else "lora_B.bias"
            raise UserError(
                f"{self.file.path}: {group.module} has {has}, but lora_bias is {wanted} in "
                f"{self.config.file.name}"
            )
        if bias is None:
            return
        name, info = self.places.find(f"{group.module}.bias", f"{group.module}.bias")
        self.places.check_shape(group, name, info, bias.shape)
        self._add(name, BiasPart(self.file, bias, scaling))

    # -- whole tensors ----------------------------------------------------------------

    def add_whole(self, parameter: str, info: TensorInfo) -> None:
        if self.places.rename(parameter) not in self.base.tensors:
            raise UserError(
                f"{info.path}: replaces {parameter}, which {self.base.source} has not got; load "
                "the base in transformers with the head that was trained (AutoModelFor...), save "
                "it, and merge into that"
            )
        name, found = self.places.find(parameter, parameter)
        if found.shape != info.shape:
            raise UserError(
                f"{info.path}: {info.name} is {info.shape}, but {name} in {self.base.source} is "
                f"{found.shape}; resize the base as it was for training and save it first"
                + resizing(name, info.shape, found.shape)
            )
        part = ReplacementPart(self.file, info)
        # PEFT saves an adapted embedding's own weight too. It is the base's, or else what the
        # adapter does goes on top of it.
        if ".base_layer." in info.name and self._same_values(name, info):
            return
        if ".base_layer." in info.name and name in self.parts:
            first = self.parts[name][0]
            if isinstance(first, TokensPart):
                self.parts[name] = [dataclasses.replace(part, tokens=first)]
                return
            if any(getattr(other, "magnitude", None) for other in self.parts[name]):
                raise UserError(
                    f"{info.path}: {info.name} is not {name} of {self.base.source}; use the base "
                    "that the adapter was trained on"
                )
            self.parts[name].insert(0, part)
            return
        self._add(name, part)

    def _same_values(self, name: str, info: TensorInfo) -> bool:
        """Whether the base holds these values, but for the rows of tokens that are replaced."""
        parts = self.parts.get(name, [])
        tokens = [token for part in parts for token in getattr(part, "tokens", ())]
        kept = torch.ones(info.rows, dtype=torch.bool)
        kept[tokens] = False
        return all(
            torch.equal(
                self.base.read(name, start, stop)[kept[start:stop]].to(torch.float64),
                self.file.read(info, start, stop)[kept[start:stop]].to(torch.float64),
            )
            for start, stop in row_blocks(info, _COMPARED_ELEMENTS)
        )

    def check_saved(self, whole: dict[str, TensorInfo]) -> None:
        """Modules of the base that modules_to_save names must be in the file, all of them."""
        held = {self.places.rename(name) for name in whole}
        check_saved(self.file, self.config, self.base, held)

    def _add(self, name: str, part: Part) -> None:
        if name in self.parts:
            other = self.parts[name][0].source.name
            raise UserError(f"{self.file.path}: {part.source.name} and {other} both change {name}")
        self.parts[name] = [part]

    # -- orientation of square weights ---------------------------------------------------

    def finished(self) -> dict[str, list[Part]]:
        """The parts, once the square weights' orientation is known.

        A rectangular weight shows its orientation. A square one does not: there fan_in_fan_out
        decides, unless the adapter's rectangular weights contradict it (PEFT saves the flag of the
        module that it wrapped last, which says nothing of the others where a model has both kinds).
        """
        flag = self.config.fan_in_fan_out
        other = next((name for name in self._shown if self._shown[name] != flag), None)
        if other and self._squares:
            mixed = flag in self._shown.values()
            raise UserError(
                f"{self.config.file}: fan_in_fan_out is {flag}, but {other} is stored the other "
                f"way, so the orientation of the square {self._squares[0][0]} is not known; "
                + ("save each kind as an adapter of its own" if mixed else f"set it to {not flag}")
            )
        for name, part in self._squares:
            place = self.parts[name].index(part)
            self.parts[name][place] = dataclasses.replace(part, transposed=flag)
        return self.parts
