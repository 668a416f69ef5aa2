"""A PEFT adapter on disk: which parameters it changes, and by how much.

An `Update` is what the adapter does to one parameter. It answers with the delta of some rows in
fp32, in the very bits that PEFT computes, with the same delta in float64, and with the magnitude
that bounds the distance between the two (formulas: Hu et al., arXiv 2106.09685, section 4.1;
scaling of rsLoRA: Kalajdzievski, arXiv 2312.03732).

Coverage is what the tensors say, not ``target_modules``. What is not understood is refused by
name: nothing is merged by guess.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.checkpoint import Checkpoint, locate_adapter, read_json_object
from taskvec.cli import UserError
from taskvec.tensorfile import TensorFile, TensorInfo

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# A product of few rows takes another path through the BLAS than the whole matrix does, and has
# other last bits: with MKL below 2 rows on Intel's processors, below 4 on AMD's; where it has fewer
# than 12 columns, so can any rows. More than twice that is computed, or the whole.
_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 32

# Configuration keys that change what B @ A means, and what to do about them.
_REFUSED_FLAGS = {
    "use_dora": "DoRA adapters are not supported yet",
    "lora_bias": "lora_bias is not supported yet",
    "modules_to_save": "modules_to_save is not supported yet",
    "trainable_token_indices": "trainable tokens are not supported yet",
    "target_parameters": "target_parameters is not supported yet",
    "layer_replication": "layer_replication changes the architecture",
    "alora_invocation_tokens": "aLoRA is active for some tokens only, so it has no static delta",
    "use_qalora": "QA-LoRA pools the inputs, so its delta has another shape",
    "use_bdlora": "BD-LoRA is not supported",
    "arrow_config": "Arrow routes between adapters, so it has no static delta",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA is not supported",
}
# These start from chosen factors but leave the base as it is.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class Update:
    """A low-rank update of one parameter, with its factors in memory.

    Attributes:
        parameter: the parameter's name in the base.
        A: (r, in) fp32.
        B: (out, r) fp32.
        scaling: s, a Python float as PEFT keeps it.
        transposed: the parameter is stored (in, out), as GPT-2's Conv1D does.
    """

    parameter: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The parameter's stored shape."""
        out, into = self.B.shape[0], self.A.shape[1]
        return (into, out) if self.transposed else (out, into)

    def delta(self, start: int, stop: int, *, prescaled: bool = False) -> torch.Tensor:
        """Rows of fl32(fl32(B @ A) * s), fp32: the bits of PEFT's get_delta_weight.

        Args:
            start, stop: rows of the parameter as stored.
            prescaled: fold s into B before the product instead.

        Returns:
            (stop - start, columns) fp32.
        """
        low, high = _widened(start, stop, *self.shape)
        B, A = self._rows(low, high)
        product = self._stored((B * self.scaling) @ A if prescaled else B @ A)
        rows = product[start - low : stop - low]
        return rows if prescaled else rows * self.scaling

    def exact(self, start: int, stop: int) -> torch.Tensor:
        """Rows of s * B @ A computed in float64: exact to 2^-29 of what fp32 could lose."""
        B, A = self._rows(start, stop)
        return self._stored((B.double() * self.scaling) @ A.double())

    def magnitude(self, start: int, stop: int) -> torch.Tensor:
        """Rows of |s| * (|B| @ |A|) in float64, to which matmul errors are relative."""
        B, A = self._rows(start, stop)
        return self._stored((B.double().abs() * abs(self.scaling)) @ A.double().abs())

    def magnitude_sums(self, start: int, stop: int) -> torch.Tensor:
        """|s| * (sum_k |B_ik| + sum_k |A_kj|) for the same rows, float64."""
        B, A = (factor.double().abs() for factor in self._rows(start, stop))
        return self._stored((B.sum(1, keepdim=True) + A.sum(0, keepdim=True)) * abs(self.scaling))

    def rounded_factors(self, dtype: torch.dtype) -> Update:
        """The update of an adapter whose factors were stored in ``dtype`` on the way."""
        A, B = (factor.to(dtype).float() for factor in (self.A, self.B))
        return Update(self.parameter, A, B, self.scaling, self.transposed)

    def _rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.transposed:
            return self.B, self.A[:, start:stop]
        return self.B[start:stop], self.A

    def _stored(self, product: torch.Tensor) -> torch.Tensor:
        return product.T if self.transposed else product


def _widened(start: int, stop: int, rows: int, columns: int) -> tuple[int, int]:
    """The rows to compute so that ``start`` to ``stop`` come out as in the whole product."""
    if columns < _FEWEST_COLUMNS:
        return 0, rows
    high = min(rows, max(stop, start + _FEWEST_ROWS))
    return max(0, min(start, high - _FEWEST_ROWS)), high


@dataclass(frozen=True)
class _Pair:
    """The two tensors of a module, before the base is known."""

    module: str
    A: TensorInfo
    B: TensorInfo
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter opened for reading and bound to a base: parameter names are the base's.

    Attributes:
        path: its directory.
        config: its adapter_config.json.
        scalings: s of each parameter that it changes, in the order of the base.
        stored_bytes: size of its tensors.
    """

    path: Path
    config: LoraConfig
    scalings: dict[str, float]
    stored_elements: int
    stored_bytes: int
    _file: TensorFile
    _pairs: dict[str, _Pair]
    _transposed: dict[str, bool]

    @property
    def parameters(self) -> list[str]:
        """Names, in the base, of the parameters that this adapter changes."""
        return list(self._pairs)

    @property
    def files(self) -> list[Path]:
        return [self.path / CONFIG_FILE, self.path / WEIGHTS_FILE]

    def update(self, parameter: str, device: torch.device) -> Update:
        """What the adapter does to one parameter, its factors raised to fp32 on ``device``.

        Raises:
            UserError: a factor holds NaN or infinity.
        """
        pair = self._pairs[parameter]
        A, B = (self._factor(info, device) for info in (pair.A, pair.B))
        return Update(parameter, A, B, pair.scaling, self._transposed[parameter])

    def _factor(self, info: TensorInfo, device: torch.device) -> torch.Tensor:
        factor = self._file.read(info).to(device, torch.float32)
        if not torch.isfinite(factor).all():
            bad = int((~torch.isfinite(factor)).sum())
            raise UserError(f"{info.path}: {info.name}: {bad} values are NaN or infinite")
        return factor


@contextlib.contextmanager
def open_adapter(source: str, base: Checkpoint) -> Iterator[Adapter]:
    """Open an adapter and match it with the base it will be merged into.

    Args:
        source: directory or hub id of a PEFT LoRA adapter.
        base: the base model.

    Raises:
        UserError: not a plain LoRA adapter, a factor without its partner, a module that the base
            has not got, shapes that do not fit (all named); a quantised base.

    Example:
        with open_checkpoint(b) as base, open_adapter(l, base) as adapter:
            for name in adapter.parameters:
                update = adapter.update(name, torch.device("cpu"))
                rows = update.delta(0, 10)   # (10, in) fp32
    """
    base.refuse_quantised()  # first: its packed weights would look like wrong shapes
    path = locate_adapter(source)
    config = read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{path}: holds no {WEIGHTS_FILE}; PEFT's save_pretrained() writes one")
    with TensorFile(weights) as file:
        pairs = _bind(_pairs(file, config), base)
        yield Adapter(
            path=path,
            config=config,
            scalings={name: pair.scaling for name, pair in pairs.items()},
            stored_elements=sum(info.elements for info in file.tensors.values()),
            stored_bytes=sum(info.nbytes for info in file.tensors.values()),
            _file=file,
            _pairs=pairs,
            _transposed=_orientations(pairs, base, config),
        )


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json of a plain LoRA adapter.

    Attributes:
        file: where it lies.
        values: its content.
    """

    file: Path
    values: dict[str, Any]

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.values.get("fan_in_fan_out"))

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module, with rank_pattern and alpha_pattern as PEFT matches them.

        Returns:
            r and s, which is alpha / r, or alpha / sqrt(r) for rsLoRA.

        Raises:
            UserError: r is not a positive integer or alpha is not a finite number.
        """
        r = self._by_pattern("rank_pattern", module, self.values.get("r"))
        alpha = self._by_pattern("alpha_pattern", module, self.values.get("lora_alpha"))
        if type(r) is not int or not 0 < r < 2**31:
            raise UserError(f"{self.file}: r of {module} is {r!r}, not a positive integer")
        if type(alpha) not in (int, float) or not abs(alpha) < 1e300:  # NaN neither
            raise UserError(f"{self.file}: lora_alpha of {module} is {alpha!r}, not a number")
        return r, alpha / math.sqrt(r) if self.values.get("use_rslora") else alpha / r

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.file}: {key} is {patterns!r}, not a mapping")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(f"{self.file}: {key}: {pattern!r}: {error}") from None
        return default


def load_config(path: Path) -> LoraConfig:
    """adapter_config.json as it is, of whatever kind of adapter.

    Raises:
        UserError: missing or not JSON.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{path}: holds no {CONFIG_FILE}, so its scaling is unknown")
    return LoraConfig(file, read_json_object(file))


def read_config(path: Path) -> LoraConfig:
    """adapter_config.json of a plain LoRA adapter; anything else is refused by name.

    Raises:
        UserError: missing, not JSON, or a kind of adapter that is not understood.
    """
    config = load_config(path)
    for reason in refusals(config):
        raise UserError(f"{config.file}: {reason}")
    return config


def refusals(config: LoraConfig) -> Iterator[str]:
    """Every reason why a configuration is not that of a plain LoRA adapter."""
    values = config.values
    if values.get("peft_type") != "LORA":
        yield f"peft_type is {values.get('peft_type')!r}; only LORA is supported"
    for key, reason in _REFUSED_FLAGS.items():
        if values.get(key):
            yield f"{key} is set: {reason}"
    if values.get("bias", "none") != "none":
        yield f"bias is {values['bias']!r}: trained biases are not supported yet"
    initialisation = values.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        yield (
            f"init_lora_weights is {initialisation!r}, which changes the base itself; "
            "save it as plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def factor_of(name: str) -> tuple[str, str] | None:
    """The module and side ("A" or "B") of an adapter tensor; None if it is no LoRA factor."""
    match = _FACTOR.match(name.removeprefix(_PREFIX))
    if not name.startswith(_PREFIX) or match is None:
        return None
    return match["module"], match["side"]


def _pairs(file: TensorFile, config: LoraConfig) -> list[_Pair]:
    """The A and B of every module, checked against each other and the configured rank."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        factor = factor_of(name)
        if factor is None:
            raise UserError(f"{file.path}: {name}: not a tensor of a plain LoRA adapter")
        if not info.is_float or len(info.shape) != 2:
            raise UserError(f"{file.path}: {name}: {info.dtype} {info.shape} is no LoRA factor")
        sides.setdefault(factor[0], {})[factor[1]] = info
    if not sides:
        raise UserError(f"{file.path}: holds no LoRA tensors")
    return [_pair(file.path, module, factors, config) for module, factors in sides.items()]


def _pair(path: Path, module: str, factors: dict[str, TensorInfo], config: LoraConfig) -> _Pair:
    if len(factors) == 1:
        present, missing = ("A", "B") if "A" in factors else ("B", "A")
        raise UserError(f"{path}: {module} has lora_{present} but no lora_{missing}")
    A, B = factors["A"], factors["B"]
    rank, scaling = config.scaling(module)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{path}: {module}: lora_A {A.shape} and lora_B {B.shape} do not have the rank {rank} "
            f"of {config.file.name}"
        )
    return _Pair(module, A, B, scaling)


def _bind(pairs: list[_Pair], base: Checkpoint) -> dict[str, _Pair]:
    """Pairs by the base's name for their parameter, in the order of the base's files."""
    rename = _renaming([pair.module for pair in pairs], base)
    bound = {}
    for pair in pairs:
        name = rename(f"{pair.module}.weight")
        if name not in base.tensors:
            raise UserError(f"{pair.A.path}: adapts {pair.module}, which {base.source} has not got")
        bound[name] = pair
    return {name: bound[name] for name in base.tensors if name in bound}


def _renaming(modules: list[str], base: Checkpoint) -> Callable[[str], str]:
    """The naming rule that fits every module, as a function; the plain one if none does."""
    for strip, add in naming_rules(modules, base):
        if all(f"{add}{module.removeprefix(strip)}.weight" in base.tensors for module in modules):
            return lambda name: add + name.removeprefix(strip)
    return lambda name: name


def naming_rules(modules: Iterable[str], base: Checkpoint) -> list[tuple[str, str]]:
    """From names in memory to names in the file: leading part to take off, and to put on.

    A base saved from its backbone names ``h.0.attn`` what an adapter trained with a head calls
    ``transformer.h.0.attn``; the reverse happens too. One rule must fit every module.
    """
    heads = {module.split(".", 1)[0] + "." for module in modules}
    strips = heads if len(heads) == 1 else set()
    adds = sorted({name.split(".", 1)[0] + "." for name in base.tensors})
    return [("", ""), *((head, "") for head in strips), *(("", head) for head in adds)]


def _orientations(pairs: dict[str, _Pair], base: Checkpoint, config: LoraConfig) -> dict[str, bool]:
    """Whether each parameter is stored (in, out); every shape is checked on the way.

    A rectangular weight shows its orientation. A square one does not: there fan_in_fan_out decides,
    unless the adapter's rectangular weights contradict it (PEFT saves the flag of the module that
    it wrapped last, which says nothing of the others where a model has both kinds).
    """
    flag = config.fan_in_fan_out
    shown: dict[str, bool] = {}
    for name, pair in pairs.items():
        out, into, stored = pair.B.shape[0], pair.A.shape[1], base.tensors[name].shape
        if stored not in ((out, into), (into, out)):
            raise UserError(
                f"{pair.A.path}: {pair.module}: B @ A is {(out, into)}, but {name} in "
                f"{base.source} is {stored}"
            )
        if not base.tensors[name].is_float:
            raise UserError(f"{base.source}: {name} is {base.tensors[name].dtype}, not a float")
        if out != into:
            shown[name] = stored == (into, out)
    other = next((name for name in shown if shown[name] != flag), None)
    if other and len(shown) < len(pairs):
        square = next(name for name in pairs if name not in shown)
        mixed = flag in shown.values()
        raise UserError(
            f"{config.file}: fan_in_fan_out is {flag}, but {other} is stored the other way, so the "
            f"orientation of the square {square} is not known; "
            + ("save each kind as an adapter of its own" if mixed else f"set it to {not flag}")
        )
    return {name: shown.get(name, flag) for name in pairs}
