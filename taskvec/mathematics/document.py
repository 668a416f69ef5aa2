"""The findings about all parameters as one JSON document. No NaN and no Infinity.

`Analysis` takes one parameter's finding after another and keeps scalars, spectra and histograms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from taskvec.architecture import layer_split
from taskvec.mathematics.identities import IDENTITIES, Check
from taskvec.mathematics.parameter import ParameterFinding
from taskvec.mathematics.spectra import SpectralComparison
from taskvec.mathematics.statistics import ULP_BINS, ULP_LIMIT, PairStatistics, UlpResiduals
from taskvec.streamstats import JointMagnitudes, MagnitudeHistogram

# The order in which a layer computes them, for tables and figures.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What T - delta looks like: random noise, updates lost to rounding, something that is not rounding,
# or something that is not random, which it would take the base to tell from rounding.
RANDOM, LOST, FOREIGN, UNKNOWN = "random", "lost", "foreign", "unknown"
_OVER_THE_FLOOR = 1.05  # the floor is the leading terms of a bound


@dataclass
class _Module:
    """What the parameters of one kind have in common, such as all q_proj."""

    statistics: PairStatistics = field(default_factory=PairStatistics)
    names: list[str] = field(default_factory=list)
    left: list[torch.Tensor] = field(default_factory=list)
    right: list[torch.Tensor] = field(default_factory=list)


class Analysis:
    """Collects findings.

    Args:
        names: of all parameters to come, from which their modules get their labels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.labels = module_labels(names)
        self.pooled = PairStatistics()
        self.modules: dict[str, _Module] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.spectra: dict[str, tuple[tuple[int, int], SpectralComparison]] = {}
        self.checks = [Check(identity) for identity in IDENTITIES]

    def add(self, finding: ParameterFinding) -> None:
        """Take one parameter into account; the finding itself need not be kept."""
        label = self.labels[finding.name]
        self.entries[finding.name] = {**finding.as_json(), "module": label}
        self.pooled.merge(finding.statistics)
        module = self.modules.setdefault(label, _Module())
        module.statistics.merge(finding.statistics)
        module.names.append(finding.name)
        for check in self.checks:
            check.add(finding)
        if finding.spectra is not None:
            self.spectra[finding.name] = (finding.matrix, finding.spectra)
            if finding.spectra.directions:
                for kept, found in (
                    (module.left, finding.spectra.left_similarity),
                    (module.right, finding.spectra.right_similarity),
                ):
                    kept.append(torch.tensor(found, dtype=torch.float64))

    def document(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """mathematical_analysis.json."""
        summary = {
            "parameters": len(self.entries),
            "matrices": len(self.spectra),
            "adapter_rank": _range([entry["adapter_rank"] for entry in self.entries.values()]),
            "precision": self._precision(),
            "identities_hold": all(check.held == check.checked for check in self.checks),
            "spectra": spectral_summary([s for _, s in self.spectra.values()]),
            "predictions": predictions(list(self.spectra.values())),
            **self.pooled.as_json(),
        }
        return {
            "inputs": inputs,
            "summary": summary,
            "identities": [check.as_json() for check in self.checks],
            "modules": {label: self._module(self.modules[label]) for label in self._in_order()},
            "histograms": {
                "joint": _joint(self.pooled.joint),
                "residual_magnitude": _magnitudes(self.pooled.residuals),
                "residual_in_ulps": _ulps(self.pooled.ulps),
            },
            "parameters": self.entries,
        }

    def _in_order(self) -> list[str]:
        """The modules' labels: known projections first, the others as they came."""

        def rank(label: str) -> int:
            last = label.rsplit(".", 1)[-1]
            return _PROJECTIONS.index(last) if last in _PROJECTIONS else len(_PROJECTIONS)

        return sorted(self.modules, key=rank)

    def _precision(self) -> str | None:
        """The format of the merged weights: one name, "mixed", or None where not known."""
        names = {entry["precision"] for entry in self.entries.values()}
        return names.pop() if len(names) == 1 else "mixed"

    def _module(self, module: _Module) -> dict[str, Any]:
        found = [self.spectra[name][1] for name in module.names if name in self.spectra]
        content = module.statistics.as_json()
        del content["moments"], content["quantiles"]
        return {
            "parameters": len(module.names),
            **content,
            "spectra": spectral_summary(found),
            "left_similarity": _mean(module.left),
            "right_similarity": _mean(module.right),
        }


def module_labels(names: Iterable[str]) -> dict[str, str]:
    """A short label for each parameter, the same for the same parameter of every layer.

    Example:
        module_labels(["model.layers.0.self_attn.q_proj.weight"])  -> {...: "q_proj"}
    """
    keys = {name: _within_layer(name) for name in names}
    short: dict[str, set[tuple[str, str]]] = {}
    for key in keys.values():
        short.setdefault(key[1].rsplit(".", 1)[-1], set()).add(key)
    within: dict[str, set[tuple[str, str]]] = {}
    for key in keys.values():
        within.setdefault(key[1], set()).add(key)

    def label(key: tuple[str, str]) -> str:
        last = key[1].rsplit(".", 1)[-1]
        if len(short[last]) == 1 and last != "bias":
            return last
        return key[1] if len(within[key[1]]) == 1 else f"{key[0]} {key[1]}"

    return {name: label(key) for name, key in keys.items()}


def _within_layer(name: str) -> tuple[str, str]:
    """The stack of layers and the name within it, without a closing ``.weight``."""
    split = layer_split(name)
    stack, rest = (split[0], split[2]) if split else ("", name)
    return stack, rest.removesuffix(".weight")


def residual_nature(found: Sequence[SpectralComparison]) -> str:
    """What T - delta is: random as long as no singular value of it stands above the floor.

    Where one does, although the roundings explain every element, what was too small was lost whole,
    and what was lost has directions of its own.
    """
    ratios = [_ratio(s.residual_norm, s.floors.residual.threshold) or 0.0 for s in found]
    if max(ratios, default=0.0) <= _OVER_THE_FLOOR:
        return RANDOM
    explained = [s.floors.explained_share for s in found if s.floors.explained_share is not None]
    if len(explained) < len(found):
        return UNKNOWN
    return LOST if min(explained) > 0.999 else FOREIGN


def spectral_summary(found: Sequence[SpectralComparison]) -> dict[str, Any] | None:
    """Medians and extremes over some matrices; None for none."""
    if not found:
        return None
    with_rank = [spectra for spectra in found if spectra.directions]
    angles = [max(*s.left_angles, *s.right_angles) for s in with_rank]
    similar = [
        matrix[s.directions - 1][s.directions - 1]
        for s in with_rank
        for matrix in (s.left_similarity, s.right_similarity)
    ]
    amplified = [s.amplification for s in found if s.amplification is not None]
    return {
        "task_vector_rank": _range([s.task_vector.numerical_rank for s in found]),
        "delta_rank": _range([s.delta.numerical_rank for s in found]),
        "ranks_equal": sum(s.task_vector.numerical_rank == s.delta.numerical_rank for s in found),
        "task_vector_effective_rank": _range([s.task_vector.effective_rank for s in found]),
        "delta_effective_rank": _range([s.delta.effective_rank for s in found]),
        "task_vector_stable_rank": _range([s.task_vector.stable_rank for s in found]),
        "delta_stable_rank": _range([s.delta.stable_rank for s in found]),
        "residual_nature": residual_nature(found),
        "floor": "predicted" if all(s.floors.predicted for s in found) else "measured",
        "base_rounded": sum(s.floors.base_rounded for s in found),
        "residual_to_edge": _range(
            [_ratio(s.residual_norm, s.floors.residual.edge) for s in found]
        ),
        "residual_to_threshold": _range(
            [_ratio(s.residual_norm, s.floors.residual.threshold) for s in found]
        ),
        "largest_angle_degrees": math.degrees(max(angles)) if angles else None,
        "smallest_similarity": min(similar) if similar else None,
        "recovery_error": _ratio(
            math.sqrt(sum(s.recovery_error**2 for s in found)),
            math.sqrt(sum(sum(v**2 for v in s.delta.values) for s in found)),
        ),
        "amplification": _range(amplified) if amplified else None,
        "exact": all(s.task_vector.exact for s in found),
    }


def predictions(
    spectra: Sequence[tuple[tuple[int, int], SpectralComparison]],
) -> list[dict[str, Any]]:
    """What a model of the noise says should be found, and what was.

    Each entry: name, statement, because, predicted, measured (a range or a count), and of how many
    matrices it speaks.
    """
    found = [s for _, s in spectra]
    if not found:
        return []
    known = all(s.floors.predicted for s in found)
    entries = []
    if known:
        entries.append(_rms_prediction(spectra))
    entries += [_edge_prediction(found), _rank_prediction(found), _recovery_prediction(spectra)]
    return [entry for entry in entries if entry["matrices"]]


def _rms_prediction(
    spectra: Sequence[tuple[tuple[int, int], SpectralComparison]],
) -> dict[str, Any]:
    return {
        "name": "noise",
        "statement": "rms(T − Δ) = ε = rms of ulp(M)/√12 over the merged weights",
        "because": "A number rounded to the nearest multiple of an ulp errs by anything in "
        "[−ulp/2, ulp/2] alike, and x² averages ulp²/12 there: (1 + 2(g/ulp)²) times that if W and "
        "Δ are multiples of g themselves, and nothing if g ≥ ulp. Where the errors show that the "
        "base was rounded too, ulp(W)²/12 is added; a base that is a number of the format already "
        "loses a Δ below ulp/2 whole, which counts as Δ².",
        "measure": "Measured over predicted",
        "matrices": len(spectra),
        "predicted": 1.0,
        "measured": _range(
            [_ratio(s.floors.measured.rms, s.floors.residual.rms) for _, s in spectra]
        ),
    }


def _edge_prediction(found: Sequence[SpectralComparison]) -> dict[str, Any]:
    return {
        "name": "floor",
        "statement": "‖T − Δ‖₂ ≤ largest row norm + largest column norm of ε, about ε(√m + √n)",
        "because": "Errors that know nothing of each other make a random matrix, and its spectrum "
        "ends there: Bai and Yin where all errors are of one size, Bandeira and van Handel "
        "(arXiv 1408.6185) where rows and columns differ.",
        "measure": "‖T − Δ‖₂ over the floor",
        "matrices": len(found),
        "predicted": 1.0,
        "measured": _range([_ratio(s.residual_norm, s.floors.residual.threshold) for s in found]),
    }


def _rank_prediction(found: Sequence[SpectralComparison]) -> dict[str, Any]:
    above = [
        s
        for s in found
        if s.directions and s.delta.values[s.directions - 1] > s.floors.task_vector.threshold
    ]
    return {
        "name": "rank",
        "statement": "as many σᵢ(T) above the floor as Δ has directions, where σ_r(Δ) is above it",
        "because": "Noise on top of a direction that stands above the floor makes it longer: "
        "σᵢ(T)² is near (σ² + mε²)(σ² + nε²)/σ² with σ = σᵢ(Δ) (Benaych-Georges and Nadakuditi, "
        "arXiv 1103.2221). What is left of T beyond Δ's directions is noise, which ends at the "
        "floor.",
        "measure": "Matrices where it is so",
        "matrices": len(above),
        "predicted": len(above),
        "measured": sum(s.task_vector.numerical_rank == s.delta.numerical_rank for s in above),
    }


def _recovery_prediction(
    spectra: Sequence[tuple[tuple[int, int], SpectralComparison]],
) -> dict[str, Any]:
    chosen = [
        (shape, s)
        for shape, s in spectra
        if s.directions and s.task_vector.numerical_rank >= s.directions
    ]

    def expected(shape: tuple[int, int], s: SpectralComparison) -> float:
        r = s.directions
        noise = s.floors.residual.rms * math.sqrt(r * (shape[0] + shape[1] - r))
        return math.hypot(noise, s.delta_tail)

    return {
        "name": "recovery",
        "statement": "‖T_r − Δ‖ = ε√(r(m + n − r)), against ‖T − Δ‖ = ε√(mn)",
        "because": "Matrices of rank r have r(m + n − r) degrees of freedom. Cutting T down to "
        "rank r keeps only the noise that lies along those, out of mn. What fp32 left of Δ beyond "
        "its rank, ‖Δ − Δ_r‖, is added to the prediction.",
        "measure": "Measured over predicted",
        "matrices": len(chosen),
        "predicted": 1.0,
        "measured": _range([_ratio(s.recovery_error, expected(d, s)) for d, s in chosen])
        if chosen
        else None,
    }


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": min(known), "median": median(known), "max": max(known)}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(matrices: Sequence[torch.Tensor]) -> list[list[float]] | None:
    """The mean of matrices, as far as all of them reach; None for none."""
    if not matrices:
        return None
    rows, columns = (min(matrix.shape[axis] for matrix in matrices) for axis in (0, 1))
    mean: list[list[float]] = torch.stack([m[:rows, :columns] for m in matrices]).mean(0).tolist()
    return mean


def _joint(joint: JointMagnitudes) -> dict[str, Any]:
    """The occupied part of the histogram; a row per bin of |delta|, as a line of counts."""
    delta = _occupied(joint.counts.sum(1))
    task_vector = _occupied(joint.counts.sum(0))
    part = joint.counts[delta[0] : delta[1], task_vector[0] : task_vector[1]]
    return {
        "delta_bins": list(delta),
        "task_vector_bins": list(task_vector),
        "counts": [" ".join(map(str, row)) for row in part.tolist()],
    }


def _magnitudes(histogram: MagnitudeHistogram) -> dict[str, Any]:
    bins = _occupied(histogram.counts)
    return {"bins": list(bins), "counts": histogram.counts[bins[0] : bins[1]].tolist()}


def _occupied(counts: torch.Tensor) -> tuple[int, int]:
    """First and one past the last bin that is not empty."""
    filled = counts.nonzero().flatten()
    return (int(filled[0]), int(filled[-1]) + 1) if filled.numel() else (0, 0)


def _ulps(ulps: UlpResiduals | None) -> dict[str, Any] | None:
    if ulps is None:
        return None
    return {"limit": ULP_LIMIT, "bins": ULP_BINS, "counts": ulps.counts.tolist()}
