"""mathematical_analysis.json as a report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taskvec.mathematics.report import (
    BOTH,
    HEADER,
    PARAMETER_HEADER,
    Document,
    finding,
    module_rows,
    parameter_rows,
    share,
    span,
)
from taskvec.wording import number, percent

_DEFINITIONS = """\
## Definitions

- W: the base's weight. Δ = s·BA: what the adapter adds, as fp32 computes it. M: the merged weight
  as stored. T = fl₃₂(M − W): the task vector. ulp(M): the spacing of the format's numbers at M.
- ‖·‖ is the Frobenius norm, ‖·‖₂ the largest singular value σ₁, ⟨T, Δ⟩ the sum of products.
- Cosine: ⟨T, Δ⟩/(‖T‖‖Δ‖). Pearson's r: the same after subtracting the means. Slope and intercept:
  least squares of T on Δ. Relative error: ‖T − Δ‖/‖Δ‖. SNR: 10 log₁₀ of mean Δ² over mean (T − Δ)².
- Exact: T equals Δ in every bit. Moments are the population's; kurtosis is 3 for a normal
  distribution and 1.8 for a uniform one.
- Noise floor: rounding leaves an error of variance ulp(M)²/12 on each weight. A random matrix with
  such entries has its largest singular value near ε(√m + √n), ε being their rms; where rows and
  columns differ in size the floor is the norm of the largest row plus that of the largest column
  (Bandeira and van Handel, arXiv 1408.6185). Δ has the floor of an fp32 matmul's roundings, and T
  that of both. Numerical rank: singular values above the floor.
- Effective rank: exp(−Σ p ln p) with p = σ/Σσ (Roy and Vetterli 2007). Stable rank: ‖·‖²/‖·‖₂².
- φ(i, j) = ‖U_iᵀU'_j‖²/min(i, j): how much of the smaller of two spans of singular vectors lies in
  the larger one (Hu et al., arXiv 2106.09685, section 7.2). Principal angles: between T's first r
  directions and Δ's. Amplification: ‖Δ‖/‖U_rᵀWV_r‖ (ibid., section 7.3).
- "Cut to rank": ‖T_r − Δ‖/‖Δ‖ with T_r the sum of T's first r singular triplets, r the rank of Δ.
"""

_IDENTITIES_NOTE = (
    "The two sides of each are computed by different ways through the data. Shown is the parameter "
    "where the statement comes closest to failing. For an equation, the gap is relative to the "
    "size of its terms and has to be below 10⁻⁹; for an inequality, left over right is at most 1."
)

_NORMS = ("task_vector_norm", "delta_norm", "residual_norm")

_DIFFERENCES = ("max_absolute_difference", "mean_absolute_difference")


def markdown(document: Document, captions: Mapping[str, str]) -> str:
    """mathematical_analysis.md.

    Args:
        document: the JSON document.
        captions: what to see in each figure, by file name.
    """
    parts = [
        "# Task vector T against LoRA delta Δ",
        "",
        f"**{finding(document)}**",
        "",
        "## Inputs",
        "",
        *(f"- {key}: `{value}`" for key, value in document["inputs"].items() if value is not None),
        "",
        _DEFINITIONS,
        "## Results",
        "",
        *_overall(document["summary"]),
        "",
        "By module; ranks are ranges over its matrices, effective ranks medians, and the angle is "
        "the largest:",
        "",
        *_markdown_table(HEADER, module_rows(document)),
        "",
        *_distributions(document["summary"]),
        "## What the number format predicts",
        "",
        *_predictions(document["summary"]["predictions"]),
        "## Identities, derived and checked",
        "",
        _IDENTITIES_NOTE,
        "",
    ]
    for identity in document["identities"]:
        parts += _identity(identity)
    parts += ["## Figures", ""]
    for file, caption in captions.items():
        parts += [f"![{caption}]({file})", "", f"*{file}*: {caption}", ""]
    parts += ["## Every parameter", ""]
    parts += _markdown_table(PARAMETER_HEADER, parameter_rows(document))
    return "\n".join(parts) + "\n"


def _overall(summary: Mapping[str, Any]) -> Iterable[str]:
    same_sign, ulps = summary["same_sign_share"], summary["residual_in_ulps"]
    rows = [
        ("parameters, elements", f"{summary['parameters']:,}, {summary['elements']:,}"),
        ("precision of M", str(summary["precision"] or "unknown")),
        ("‖T‖, ‖Δ‖, ‖T − Δ‖", ", ".join(_e(summary[key]) for key in _NORMS)),
        ("cosine", number(summary["cosine_similarity"], ".12f")),
        ("Pearson's r", number(summary["pearson_correlation"], ".12f")),
        ("slope, intercept", f"{number(summary['slope'], '.9f')}, {_e(summary['intercept'])}"),
        ("slope through the origin", number(summary["slope_through_origin"], ".9f")),
        ("relative error, SNR", f"{share(summary['relative_error'])}, {_db(summary['snr_db'])}"),
        ("largest, mean absolute T − Δ", ", ".join(_e(summary[key]) for key in _DIFFERENCES)),
        ("exact elements", percent(summary["exact_share"])),
        ("elements of T with Δ's sign", "-" if same_sign is None else percent(same_sign)),
    ]
    if ulps:
        rows += [
            ("T − Δ in ulps of M: rms, largest", f"{ulps['rms']:.4f}, {ulps['max']:.4g}"),
            ("within half an ulp", percent(ulps["share_within_half"])),
        ]
    else:
        rows.append(("T − Δ in ulps of M", "unknown without the base (`--base_model`)"))
    if spectra := summary["spectra"]:
        rows += _spectral_rows(spectra)
    return _markdown_table(("over all parameters", ""), rows)


def _spectral_rows(spectra: Mapping[str, Any]) -> list[tuple[str, str]]:
    how = "all singular values by LAPACK in float64"
    if not spectra["exact"]:
        how = (
            "all singular values by LAPACK for small matrices; for large ones the leading ones by "
            "block Krylov, effective rank by quadrature (within about 3 %)"
        )
    rows = [
        ("spectra", how),
        ("noise floor", f"{spectra['floor']}{_twice(spectra)}"),
        ("numerical rank of Δ, of T", _both(spectra, "rank", ".0f")),
        ("effective rank of Δ, of T", _both(spectra, "effective_rank", ".3g")),
        ("stable rank of Δ, of T", _both(spectra, "stable_rank", ".3g")),
        ("largest principal angle", f"{number(spectra['largest_angle_degrees'], '.3g')}°"),
        ("smallest φ(r, r)", number(spectra["smallest_similarity"], ".9f")),
    ]
    if spectra["amplification"]:
        rows.append(("amplification factor", span(spectra["amplification"], ".3g")))
    return rows


def _twice(spectra: Mapping[str, Any]) -> str:
    count = spectra["base_rounded"]
    return f"; the base was rounded too in {count} matrices, as the errors show" if count else ""


def _both(spectra: Mapping[str, Any], key: str, spec: str) -> str:
    return ", ".join(span(spectra[f"{which}_{key}"], spec) for which in BOTH)


def _distributions(summary: Mapping[str, Any]) -> list[str]:
    """Moments and quantiles of T, delta and T - delta, side by side."""
    names = {"task_vector": "T", "delta": "Δ", "residual": "T − Δ"}
    moments = [
        [key, *(_e(summary["moments"][name][key]) for name in names)]
        for key in ("mean", "std", "skewness", "kurtosis")
    ]
    quantiles = [
        [f"{100 * float(p):g} %", *(_e(summary["quantiles"][n]["values"][p]) for n in names)]
        for p in summary["quantiles"]["delta"]["values"]
    ]
    method = summary["quantiles"]["delta"]["method"]
    how = (
        "exact"
        if method == "exact"
        else "from a histogram of the numbers' upper 16 bits, within 0.8 % of the value"
    )
    return [
        f"Moments, and quantiles ({how}):",
        "",
        *_markdown_table(("", *names.values()), moments + quantiles),
        "",
    ]


def _predictions(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return ["No matrices, so nothing is predicted.", ""]
    lines = []
    for entry in entries:
        lines += [f"### {entry['statement']}", "", entry["because"], ""]
        if entry["name"] == "rank":
            found = f"{entry['measured']} of {entry['predicted']}"
        else:
            found = span(entry["measured"], ".3g", middle=True)
        lines += [f"{entry['measure']}: **{found}** ({entry['matrices']} matrices).", ""]
    return lines


def _identity(entry: Mapping[str, Any]) -> list[str]:
    lines = [f"### {entry['statement']}", ""]
    lines += [f"{line}  " for line in entry["derivation"]]
    if not entry["checked"]:
        return [*lines, "", "Not checked: it speaks of none of these parameters.", ""]
    mark = "✓" if entry["holds"] else "✗"
    size = "gap" if entry["relation"] == "=" else "left over right"
    excess = entry["excess"]
    return [
        *lines,
        "",
        f"{mark} holds for {entry['held']} of {entry['checked']} parameters ({entry['sides']}).",
        "",
        *_markdown_table(
            ("closest to failing", "left", "right", size),
            [
                [
                    f"`{entry['parameter']}`",
                    f"{entry['left']:.12g}",
                    f"{entry['right']:.12g}",
                    number(excess, ".2e" if entry["relation"] == "=" else ".4f"),
                ]
            ],
        ),
        "",
    ]


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)]


def _e(value: float | None) -> str:
    return number(value, ".4e")


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"
