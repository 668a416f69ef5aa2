"""mathematical_analysis.json as lines on stdout: the finding, and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskvec.mathematics.document import LOST, RANDOM, UNKNOWN
from taskvec.wording import number, percent, table

Document = dict[str, Any]

HEADER = (
    "module",
    "tensors",
    "cosine",
    "rel. error",
    "SNR dB",
    "rms ulps",
    "rank Δ, T",
    "eff. rank Δ, T",
    "angle °",
    "cut to rank",
)
PARAMETER_HEADER = (
    "parameter",
    "cosine",
    "slope",
    "rel. error",
    "SNR dB",
    "exact",
    "rank Δ",
    "rank T",
    "‖T−Δ‖₂ / floor",
    "amplification",
)
BOTH = ("delta", "task_vector")


def finding(document: Document) -> str:
    """What was found, in a few sentences."""
    summary = document["summary"]
    error, spectra = summary["relative_error"], summary["spectra"]
    if error is None:
        return "The adapter's delta is zero everywhere, so there is nothing to compare with."
    if error == 0:
        return "T and Δ are equal in every element."
    known = summary["precision"] in ("fp32", "fp16", "bf16")
    where = f"In {summary['precision']}, T" if known else "T"
    size = f"{share(error)} of ‖Δ‖ (SNR {summary['snr_db']:.1f} dB)"
    if spectra is None:
        return f"{where} differs from Δ by {size}."
    nature = spectra["residual_nature"]
    if nature != RANDOM:
        return f"{where} {_not_random(nature, size, summary)}"
    predicted = spectra["floor"] == "predicted"
    text = (
        f"{where} is Δ plus {'rounding noise' if predicted else 'noise'} of {size}, which stays "
        f"below the floor {'that the format predicts' if predicted else 'of its own size'}. "
        f"{_ranks(spectra, summary['matrices'])}"
    )
    recovered = spectra["recovery_error"]
    if spectra["ranks_equal"] == summary["matrices"] and recovered and recovered < 0.5 * error:
        text += (
            f" Cut down to that rank, T is within {share(recovered)} of Δ: "
            f"{error / recovered:.3g} times closer than T itself."
        )
    return text


def _not_random(nature: str, size: str, summary: Mapping[str, Any]) -> str:
    """What T is, where T - delta has singular values above the floor of noise."""
    ratio = summary["spectra"]["residual_to_threshold"]["max"]
    directions = f"directions of its own, up to {ratio:.3g} times the floor of random noise"
    if nature == LOST:
        return (
            f"is Δ rounded, with an error of {size} that is not random: what is below half an ulp "
            f"is lost whole, so the error has {directions}."
        )
    if nature == UNKNOWN:
        return (
            f"differs from Δ by {size}, and the difference has {directions}; whether rounding made "
            "it takes the base to tell (--base_model)."
        )
    return (
        f"is not Δ plus rounding: it differs by {size} with a slope of {summary['slope']:.4g}, and "
        f"the difference has {directions}."
    )


def _ranks(spectra: Mapping[str, Any], matrices: int) -> str:
    rank = spectra["delta_rank"]
    r = (
        f"{rank['min']:.0f}"
        if rank["min"] == rank["max"]
        else f"{rank['min']:.0f} to {rank['max']:.0f}"
    )
    if spectra["ranks_equal"] == matrices:
        return f"Above it stand exactly Δ's {r} directions in {_all(matrices)}."
    found = span(spectra["task_vector_rank"], ".0f")
    if spectra["task_vector_rank"]["max"] > rank["max"]:
        return f"Of Δ's {r} directions and of others, {found} stand above it."
    return f"It drowns some of Δ's {r} directions: {found} of T's stand above it."


def _all(matrices: int) -> str:
    return f"all {matrices} matrices" if matrices > 1 else "the one matrix"


def result_table(document: Document) -> list[str]:
    """The table on stdout: one line per module, and one for all together."""
    return table(HEADER, module_rows(document))


def parameter_table(document: Document) -> list[str]:
    """The same for every parameter."""
    return table(PARAMETER_HEADER, parameter_rows(document))


def module_rows(document: Document) -> list[list[str]]:
    modules = {**document["modules"], "all": document["summary"]}
    return [_row(label, entry, entry["parameters"]) for label, entry in modules.items()]


def _row(label: str, entry: Mapping[str, Any], parameters: int) -> list[str]:
    spectra = entry["spectra"] or {}
    ulps = entry["residual_in_ulps"]
    return [
        label,
        str(parameters),
        number(entry["cosine_similarity"], ".9f"),
        share(entry["relative_error"]),
        number(entry["snr_db"], ".1f"),
        number(ulps["rms"] if ulps else None, ".4f"),
        ", ".join(span(spectra.get(f"{which}_rank"), ".0f") for which in BOTH),
        ", ".join(_middle(spectra.get(f"{which}_effective_rank")) for which in BOTH),
        number(spectra.get("largest_angle_degrees"), ".2g"),
        share(spectra.get("recovery_error")),
    ]


def parameter_rows(document: Document) -> list[list[str]]:
    rows = []
    for name, entry in document["parameters"].items():
        spectra = entry["spectra"]
        floor = _floor(spectra) if spectra else 0.0
        rows.append(
            [
                name,
                number(entry["cosine_similarity"], ".9f"),
                number(entry["slope"], ".7f"),
                share(entry["relative_error"]),
                number(entry["snr_db"], ".1f"),
                percent(entry["exact_share"]),
                number(spectra["delta"]["numerical_rank"] if spectra else None, "d"),
                number(spectra["task_vector"]["numerical_rank"] if spectra else None, "d"),
                number(spectra["residual_norm"] / floor if floor else None, ".3f"),
                number(spectra["amplification"] if spectra else None, ".3g"),
            ]
        )
    return rows


def _floor(spectra: Mapping[str, Any]) -> float:
    return float(spectra["floors"]["residual"]["threshold"])


def span(span: Mapping[str, float] | None, spec: str, *, middle: bool = False) -> str:
    """A range of values, or the one value."""
    if span is None:
        return "-"
    low, high = format(span["min"], spec), format(span["max"], spec)
    if low == high:
        return low
    return f"{low} to {high}" + (f", median {format(span['median'], spec)}" if middle else "")


def _middle(span: Mapping[str, float] | None) -> str:
    return "-" if span is None else f"{span['median']:.3g}"


def share(value: float | None) -> str:
    """A share as a percentage, a tiny one as a number, a dash where it is undefined."""
    if value is None:
        return "-"
    return f"{value:.2e}" if 0 < abs(value) < 1e-5 else percent(value)
