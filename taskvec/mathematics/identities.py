"""Identities and inequalities that T and delta must obey, each with its derivation and a check.

The two sides of each are computed by different ways through the data, so that a check can fail: it
is a check of this software's arithmetic, and of the reader's trust in the other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from taskvec.mathematics.parameter import ParameterFinding
from taskvec.mathematics.spectra import SpectralComparison

_SUMS = 1e-9  # float64 sums of up to 1e9 terms, relative to the size of the terms


@dataclass(frozen=True)
class Measured:
    """Both sides of an identity for one parameter.

    Attributes:
        scale: what a difference of the two sides is relative to.
    """

    left: float
    right: float
    scale: float


@dataclass(frozen=True)
class Identity:
    """A statement about T and delta.

    Attributes:
        name: short, stable for programs.
        statement: the formula.
        relation: "=" or "<=".
        derivation: two to four lines.
        sides: how each side was computed.
        measure: both sides for a parameter; None where the statement says nothing about it.
    """

    name: str
    statement: str
    relation: str
    derivation: tuple[str, ...]
    sides: str
    measure: Callable[[ParameterFinding], Measured | None]

    def excess(self, measured: Measured) -> float:
        """How far the statement is from holding: relative to the scale, or left over right."""
        if self.relation == "=":
            gap = abs(measured.left - measured.right)
            return gap / measured.scale if measured.scale else gap
        if not measured.right:
            return math.inf if measured.left else 0.0
        return measured.left / measured.right

    def holds(self, measured: Measured) -> bool:
        if self.relation == "=":
            return abs(measured.left - measured.right) <= _SUMS * measured.scale
        return measured.left <= measured.right + _SUMS * measured.scale


@dataclass
class Check:
    """An identity, checked on every parameter that it speaks of.

    Attributes:
        checked, held: numbers of parameters.
        parameter: where it comes closest to failing, or fails most; None if none was checked.
        worst: the two sides there.
    """

    identity: Identity
    checked: int = 0
    held: int = 0
    parameter: str | None = None
    worst: Measured | None = None

    def add(self, finding: ParameterFinding) -> None:
        """Check one more parameter."""
        measured = self.identity.measure(finding)
        if measured is None:
            return
        self.checked += 1
        self.held += self.identity.holds(measured)
        excess = self.identity.excess
        if self.worst is None or excess(measured) > excess(self.worst):
            self.parameter, self.worst = finding.name, measured

    def as_json(self) -> dict[str, Any]:
        excess = self.identity.excess(self.worst) if self.worst else None
        return {
            "name": self.identity.name,
            "statement": self.identity.statement,
            "relation": self.identity.relation,
            "derivation": list(self.identity.derivation),
            "sides": self.identity.sides,
            "checked": self.checked,
            "held": self.held,
            "holds": self.held == self.checked,
            "parameter": self.parameter,
            "left": self.worst.left if self.worst else None,
            "right": self.worst.right if self.worst else None,
            "excess": excess if excess is not None and math.isfinite(excess) else None,
        }


def _expansion(finding: ParameterFinding) -> Measured:
    s = finding.statistics
    T, D = s.magnitude.squared_norm, s.sums.delta_squared
    return Measured(s.sums.difference_squared, T - 2 * s.sums.product + D, T + D)


def _determination(finding: ParameterFinding) -> Measured | None:
    s = finding.statistics
    if s.cosine is None:
        return None
    return Measured(s.cosine**2, 1 - finding.direct.unexplained / s.magnitude.squared_norm, 1.0)


def _slope(finding: ParameterFinding) -> Measured | None:
    s, slope = finding.statistics, finding.statistics.slope_through_origin
    if s.cosine is None or slope is None:
        return None
    corrected = slope + finding.direct.left_over / s.sums.delta_squared
    ratio = s.task_vector_norm / s.delta_norm
    return Measured(s.cosine * ratio, corrected, ratio)


def _snr(finding: ParameterFinding) -> Measured | None:
    s = finding.statistics
    if s.snr_db is None or s.relative_error is None:
        return None
    power = s.delta.std**2 + s.delta.mean**2, s.residual.std**2 + s.residual.mean**2
    return Measured(10 * math.log10(power[0] / power[1]), -20 * math.log10(s.relative_error), 10.0)


def _pearson(finding: ParameterFinding) -> Measured | None:
    found, direct = finding.statistics.regression.pearson, finding.direct
    norms = math.sqrt(direct.centred_task_vector) * math.sqrt(direct.centred_delta)
    return Measured(found, direct.centred_product / norms, 1.0) if found and norms else None


def _frobenius(finding: ParameterFinding) -> Measured | None:
    spectra = finding.spectra
    if spectra is None or not spectra.task_vector.exact:
        return None
    leading = sum(value**2 for value in spectra.task_vector.values[: spectra.directions])
    norm = finding.statistics.magnitude.squared_norm
    return Measured(leading + spectra.tail_from_values**2, norm, norm)


def _weyl(finding: ParameterFinding) -> Measured | None:
    spectra = finding.spectra
    if spectra is None:
        return None
    shifts = [
        abs(a - b) for a, b in zip(spectra.task_vector.values, spectra.delta.values, strict=True)
    ]
    return Measured(max(shifts), spectra.residual_norm, spectra.delta.spectral_norm)


def _eckart_young(finding: ParameterFinding) -> Measured | None:
    spectra = finding.spectra
    if spectra is None:
        return None
    s = finding.statistics
    allowed = s.residual_norm + spectra.delta_tail
    return Measured(spectra.tail_direct, allowed, s.task_vector_norm)


def _wedin(finding: ParameterFinding) -> Measured | None:
    spectra = finding.spectra
    if spectra is None or not spectra.directions:
        return None
    gap = _gap(spectra)
    if gap <= spectra.residual_norm:
        return None  # the bound is 1 or more: it says nothing
    angle = max(*spectra.left_angles, *spectra.right_angles)
    return Measured(math.sin(angle), spectra.residual_norm / gap, 1.0)


def _gap(spectra: SpectralComparison) -> float:
    """sigma_r(T) - sigma_{r+1}(delta)."""
    r = spectra.directions
    beyond = spectra.delta.values[r] if len(spectra.delta.values) > r else 0.0
    return spectra.task_vector.values[r - 1] - beyond


def _similarity(finding: ParameterFinding) -> Measured | None:
    spectra = finding.spectra
    if spectra is None or not spectra.directions:
        return None
    r = spectra.directions
    cosines = sum(math.cos(angle) ** 2 for angle in spectra.left_angles)
    return Measured(spectra.left_similarity[r - 1][r - 1], cosines / r, 1.0)


IDENTITIES = (
    Identity(
        "expansion",
        "‖T − Δ‖² = ‖T‖² − 2⟨T, Δ⟩ + ‖Δ‖²",
        "=",
        (
            "‖T − Δ‖² = ⟨T − Δ, T − Δ⟩, and the inner product is linear in both arguments.",
            "The difference is relative to ‖T‖² + ‖Δ‖²: where T ≈ Δ the right side cancels, which "
            "is why the analysis sums (T − Δ)² itself.",
        ),
        "left: sum of (T − Δ)², element by element; right: from three separate sums",
        _expansion,
    ),
    Identity(
        "cosine",
        "cos²(T, Δ) = 1 − min_c ‖T − cΔ‖² / ‖T‖²",
        "=",
        (
            "‖T − cΔ‖² = ‖T‖² − 2c⟨T, Δ⟩ + c²‖Δ‖² is least at c = ⟨T, Δ⟩/‖Δ‖².",
            "There it is ‖T‖² − ⟨T, Δ⟩²/‖Δ‖² = ‖T‖²(1 − cos²).",
            "So 1 − cos² is the share of ‖T‖² that no multiple of Δ explains.",
        ),
        "left: from the sums of the first pass; right: ‖T − cΔ‖² summed in a second pass",
        _determination,
    ),
    Identity(
        "slope",
        "c = cos(T, Δ)·‖T‖/‖Δ‖ leaves ⟨T − cΔ, Δ⟩ = 0",
        "=",
        (
            "c = ⟨T, Δ⟩/‖Δ‖² = (⟨T, Δ⟩/‖T‖‖Δ‖)·(‖T‖/‖Δ‖).",
            "Setting the derivative of ‖T − cΔ‖² to zero gives ⟨T − cΔ, Δ⟩ = 0: what is left over "
            "has nothing of Δ's direction.",
        ),
        "left: cosine times ratio of norms; right: c corrected by the left-over, second pass",
        _slope,
    ),
    Identity(
        "snr",
        "SNR = 10 log₁₀(P_Δ / P_{T−Δ}) = −20 log₁₀(‖T − Δ‖/‖Δ‖)",
        "=",
        (
            "P is mean square, so P_Δ/P_{T−Δ} = ‖Δ‖²/‖T − Δ‖² for the same number of elements,",
            "and 10 log₁₀ x² = 20 log₁₀ x. Twenty decibels are one decimal digit of the update.",
        ),
        "left: from means and variances; right: from sums of squares",
        _snr,
    ),
    Identity(
        "pearson",
        "Pearson's r = cos(T − mean T, Δ − mean Δ)",
        "=",
        (
            "r = cov(T, Δ)/(std T · std Δ); with the common 1/n cancelled that is the inner "
            "product of the centred values over their norms, which is their cosine.",
            "Cosine and r differ as far as the means are not zero.",
        ),
        "left: co-moments joined block by block; right: values centred in a second pass",
        _pearson,
    ),
    Identity(
        "frobenius",
        "Σ σᵢ(T)² = ‖T‖²",
        "=",
        ("T = UΣVᵀ with orthonormal U and V, so ‖T‖² = tr TᵀT = tr VΣ²Vᵀ = Σ σᵢ².",),
        "left: singular values from LAPACK; right: sum over the elements",
        _frobenius,
    ),
    Identity(
        "weyl",
        "maxᵢ |σᵢ(T) − σᵢ(Δ)| ≤ ‖T − Δ‖₂",
        "<=",
        (
            "σᵢ(X) is the distance in ‖·‖₂ from X to the matrices of rank below i.",
            "The closest one to Δ is at most ‖T − Δ‖₂ farther from T; the same with T and Δ "
            "swapped (Weyl, 1912).",
            "So no singular value moves by more than the noise's largest one.",
        ),
        "left: leading singular values of both; right: largest singular value of T − Δ",
        _weyl,
    ),
    Identity(
        "eckart-young",
        "‖T − T_r‖ ≤ ‖T − Δ‖ + ‖Δ − Δ_r‖",
        "<=",
        (
            "T_r, the sum of T's first r singular triplets, is the closest matrix of rank r to T "
            "in the Frobenius norm (Eckart and Young, 1936).",
            "Δ_r has rank r, so ‖T − T_r‖ ≤ ‖T − Δ_r‖ ≤ ‖T − Δ‖ + ‖Δ − Δ_r‖; the last term is "
            "what storing Δ in fp32 adds to its rank.",
        ),
        "left: T_r formed and subtracted; right: sum over the elements, and Δ's tail",
        _eckart_young,
    ),
    Identity(
        "wedin",
        "sin θ_max ≤ ‖T − Δ‖₂ / (σ_r(T) − σ_{r+1}(Δ))",
        "<=",
        (
            "θ_max is the largest angle between the spans of the first r singular vectors of T "
            "and of Δ, on either side.",
            "With E = T − Δ: U₀ᵀ(T V₁ − Δ V₁) = U₀ᵀE V₁ for Δ's remaining U₀, V₀ and T's leading "
            "U₁, V₁; the same for Eᵀ; eliminating one of U₀ᵀU₁ and V₀ᵀV₁ leaves a gap times a "
            "sine on one side and E on the other (Wedin, 1972).",
            "Checked where the right side is below 1.",
        ),
        "left: principal angles; right: singular values",
        _wedin,
    ),
    Identity(
        "similarity",
        "φ(r, r) = (1/r) Σ cos² θᵢ",
        "=",
        (
            "The principal angles' cosines are the singular values of U_rᵀU'_r, and ‖·‖²_F is "
            "the sum of their squares.",
            "φ is 1 only if every angle is zero.",
        ),
        "left: sum of squared inner products; right: angles from sines and cosines",
        _similarity,
    ),
)
