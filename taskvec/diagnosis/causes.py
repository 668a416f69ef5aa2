"""What was found about single parameters, as causes in plain sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

from taskvec.adapter import Adapter
from taskvec.diagnosis.cause import Cause, counted, named, whole
from taskvec.diagnosis.copies import Split
from taskvec.diagnosis.damage import clipped, damaged, overflow, partly_unmerged
from taskvec.diagnosis.factors import FactorTest
from taskvec.diagnosis.findings import Findings
from taskvec.diagnosis.merges import REMERGED, UNMERGED_AGAIN
from taskvec.diagnosis.partly import partly_merged
from taskvec.diagnosis.reordered import TURNED
from taskvec.diagnosis.scalings import scaled
from taskvec.rounding import FP16, Format
from taskvec.verdict import adapted
from taskvec.wording import percent

_OF_TOKENS = re.compile(r"embed|\bwte\b|lm_head")


def simple_causes(findings: Findings, adapter: Adapter) -> list[Cause]:
    """The causes that need no look at the structure of what is left."""
    return [
        *overflow(findings),
        *_unmerged(findings),
        *partly_unmerged(findings),
        *_lower_precision_base(findings),
        *_lower_precision_adapter(findings),
        *_rounded_adapter(findings),
        *_perhaps_rounded_adapter(findings),
        *_rounded_otherwise(findings),
        *_rescaled(findings),
        *_transposed(findings),
        *_without_magnitudes(findings),
        *_misapplied(findings),
        *_misplaced(findings),
        *_reordered(findings),
        *_reordered_lines(findings),
        *partly_merged(findings),
        *_shared(findings),
        *_unmerged_again(findings),
        *scaled(findings, adapter),
        *clipped(findings),
        *damaged(findings),
    ]


def _unmerged(findings: Findings) -> list[Cause]:
    names, total = list(findings.unmerged), len(findings.adapted)
    if not names:
        return []
    casts = sorted({" then ".join(f.name for f in chain) for chain in findings.unmerged.values()})
    rounded = [cast for cast in casts if cast]
    as_stored = f", rounded to {' or '.join(rounded)}" if rounded else ""
    evidence = {"parameters": names, "adapted_parameters": total, "rounded_to": rounded}
    if len(names) + _unmoved(findings) == total:
        sentence = (
            f"Nothing was merged: all {total} adapted parameters are the base's own{as_stored}, "
            "bit for bit."
        )
        return [Cause("nothing_merged", sentence, evidence, total)]
    verb = "is" if len(names) == 1 else "are"
    sentence = (
        f"Not merged: {named(names)} ({len(names)} of {total} adapted parameters), which {verb} "
        f"the base's own{as_stored}, bit for bit."
    )
    return [Cause("some_modules_not_merged", sentence, evidence, len(names))]


def _unmoved(findings: Findings) -> int:
    """Adapted parameters that hold although not one element moved: rounding may lose them all."""
    return sum(
        comparison.certificate.lost == comparison.certificate.changed_by_update
        and result.name not in findings.unmerged
        and not comparison.certificate.violations
        for result, comparison in adapted(findings.results)
    )


def _lower_precision_base(findings: Findings) -> list[Cause]:
    """One cause for each format, and for each way in which it was used."""
    groups: dict[tuple[Format, bool], list[str]] = {}
    for name, agreement in findings.merges.items():
        merge = agreement.merge
        if merge.base_format is not None:
            groups.setdefault((merge.base_format, False), []).append(name)
        elif merge.format is not findings.format:
            groups.setdefault((merge.format, True), []).append(name)
    for name, test in findings.factors.items():
        if test.base_format is not None:
            groups.setdefault((test.base_format, False), []).append(name)
    told = {format for chain in findings.unmerged.values() for format in chain}
    for name, chain in findings.rounded.items():
        key = (chain[0], (chain[0], True) in groups)
        if key in groups or chain[0] not in told:
            groups.setdefault(key, []).append(name)
    return [_rounded_first(findings, *key, names) for key, names in groups.items()]


def _rounded_first(findings: Findings, format: Format, computed: bool, names: list[str]) -> Cause:
    merged = [name for name in names if name in set(findings.adapted)]
    others = [
        result.name
        for result in findings.results
        if result.comparison is None and (result.name in names or result.cast_format == format.name)
    ]
    stored = findings.format.name
    if not merged:
        how = f"what the adapter leaves alone was rounded to {format.name} and stored as {stored}"
    elif computed:
        how = f"the merge was computed in {format.name} and then stored as {stored}"
    else:
        how = f"the base was rounded to {format.name} before the adapter was added in {stored}"
    seen = [whole(merged, findings)] if merged else []
    seen += [counted(others, "other" if merged else "parameter")] if others else []
    sentence = f"Merged from a lower-precision base: {how} (seen in {' and '.join(seen)})."
    evidence = {
        "format": format.name,
        "stored_as": stored,
        "computed_in": format.name if computed else stored,
        "parameters": merged,
        "cast_parameters": others,
    }
    return Cause("lower_precision_base", sentence, evidence, len(names))


_TF32_OR_FP16 = "TF32 or fp16"  # both keep 11 bits of a factor


def _lower_precision_adapter(findings: Findings) -> list[Cause]:
    groups: dict[str, list[str]] = {}
    for name, agreement in findings.merges.items():
        merge = agreement.merge
        if merge.delta_format is FP16 and not merge.recipe.round_delta:
            groups.setdefault(_TF32_OR_FP16, []).append(name)
        elif merge.delta_format is not None:
            groups.setdefault(merge.delta_format.name, []).append(name)
    for name, test in findings.factors.items():
        if test.tf32:
            groups.setdefault("TF32", []).append(name)
    if "TF32" in groups:  # then that is what it was where it looks like either
        groups["TF32"] += groups.pop(_TF32_OR_FP16, [])
    return [
        Cause(
            "lower_precision_adapter",
            f"The adapter's delta was computed in {format}, not in fp32, in "
            f"{whole(names, findings)}.",
            {"format": format, "parameters": names},
            len(names),
        )
        for format, names in groups.items()
    ]


def _rounded_adapter(findings: Findings) -> list[Cause]:
    causes = []
    for format in dict.fromkeys(copy.format for copy in findings.copies.values()):
        copies = {name: copy for name, copy in findings.copies.items() if copy.format is format}
        split = sum((copy.split for copy in copies.values()), Split())
        sentence = (
            f"The adapter was rounded after the merge: it holds {format.name} numbers, and "
            f"{whole(list(copies), findings)} got a delta that is within their rounding, so an "
            f"adapter of more digits was merged, of which this one is a copy in {format.name}: the "
            f"spans of its factors hold {percent(split.share)} of what sets the model apart from "
            f"its merge, where noise would leave {percent(split.share_by_chance)} ± "
            f"{percent(split.error_of_chance)}. Compare with the original."
        )
        evidence = {
            "format": format.name,
            "parameters": list(copies),
            "share_in_factor_spans": split.share,
            "share_by_chance": split.share_by_chance,
            "share_by_chance_standard_error": split.error_of_chance,
        }
        causes.append(Cause("adapter_rounded", sentence, evidence, len(copies)))
    return causes


def _perhaps_rounded_adapter(findings: Findings) -> list[Cause]:
    causes = []
    for format in dict.fromkeys(findings.maybe_copies[name] for name in findings.undecided):
        names = [name for name in findings.undecided if findings.maybe_copies[name] is format]
        sentence = (
            f"Not explained: what {whole(names, findings)} got is within what rounding the adapter "
            f"to {format.name} after the merge would do to its delta. Another change of that size "
            "cannot be told from it here."
        )
        evidence = {"parameters": names, "format": format.name}
        causes.append(Cause("unknown", sentence, evidence, len(names)))
    return causes


def _rounded_otherwise(findings: Findings) -> list[Cause]:
    causes = []
    for how in dict.fromkeys(findings.rounded_otherwise.values()):
        names = [name for name, found in findings.rounded_otherwise.items() if found == how]
        sentence = (
            f"Rounded otherwise than to the nearest number of {findings.format.name}: {how} (seen "
            f"in {whole(names, findings)})."
        )
        causes.append(
            Cause("rounded_otherwise", sentence, {"parameters": names, "how": how}, len(names))
        )
    return causes


def _rescaled(findings: Findings) -> list[Cause]:
    groups: dict[tuple[str | None, bool], list[str]] = {}
    for name, item in findings.rescaled.items():
        groups.setdefault((item.lines, item.of_base == 0), []).append(name)
    causes = []
    for (lines, alone), names in groups.items():
        found = {name: findings.rescaled[name] for name in names}
        base = [item.of_base for item in found.values()]
        delta = [item.of_delta for name, item in found.items() if name in findings.adapted]
        where = whole(names, findings)
        if alone:
            sentence = (
                f"The base is missing in {where}: what is stored there is the adapter's delta "
                "alone."
            )
        elif lines:
            ends = [value for item in found.values() for value in (item.of_base, item.of_delta)]
            sentence = (
                f"The weights themselves were scaled in {where}: each of their {lines} by a factor "
                f"of its own, {_between(ends)}, as SmoothQuant and AWQ fold the scales of "
                "activations into them, and the inverse into the layer before."
            )
        else:
            added = f", and the delta by {_between(delta)}" if delta else ""
            sentence = (
                f"The weights themselves were scaled in {where}: the base by {_between(base)}"
                f"{added}, as decay, an average, or interpolation on a sphere (SLERP) leaves them."
            )
        evidence = {
            "parameters": names,
            "lines": lines,
            "factors": {
                name: [item.of_base, item.of_delta if name in findings.adapted or lines else None]
                for name, item in found.items()
            },
        }
        causes.append(Cause("weights_scaled", sentence, evidence, len(names)))
    return causes


def _between(values: Sequence[float]) -> str:
    low, high = f"{min(values):.6g}", f"{max(values):.6g}"
    return low if low == high else f"{low} to {high}"


def _transposed(findings: Findings) -> list[Cause]:
    by_bits = {n: found for n, found in findings.merges.items() if found.merge.transposed}
    by_bounds = {name: test for name, test in findings.factors.items() if test.transposed}
    names = [*by_bits, *by_bounds]
    if not names:
        return []
    shapes = {result.name: result.shape for result in findings.results}
    reshaped = [name for name in names if len(set(shapes[name])) > 1]
    its = "its transpose" + ", reshaped where that is not square," * bool(reshaped)
    sentence = (
        f"The delta was added transposed to {whole(names, findings)}: {its} explains "
        "every element that moved, or nearly every one."
    )
    evidence = {
        "parameters": names,
        "reshaped_parameters": reshaped,
        "reproduced_share": min((1 - f.missed_share for f in by_bits.values()), default=None),
    }
    return [Cause("transposed", sentence, evidence, len(names))]


def _without_magnitudes(findings: Findings) -> list[Cause]:
    plain = {name: test for name, test in findings.factors.items() if test.plain}
    if not plain:
        return []
    names, factors = list(plain), [test.factor for test in plain.values()]
    times = "" if all(factor == 1 for factor in factors) else f", times about {factors[0]:.4g}"
    sentence = (
        f"DoRA's magnitudes were left out in {whole(names, findings)}: what was added is "
        f"scaling * B @ A{times}, as if this were a plain LoRA."
    )
    evidence = {"parameters": names, "factors": dict(zip(names, factors, strict=True))}
    return [Cause("magnitudes_left_out", sentence, evidence, len(names))]


def _misapplied(findings: Findings) -> list[Cause]:
    causes = []
    for how in dict.fromkeys(findings.misapplied.values()):
        names = [name for name, found in findings.misapplied.items() if found == how]
        sentence = (
            f"DoRA's magnitudes were misapplied in {whole(names, findings)}: W + scaling * B @ A "
            f"was {how}."
        )
        evidence = {"parameters": names, "how": how}
        causes.append(Cause("magnitudes_misapplied", sentence, evidence, len(names)))
    return causes


def _misplaced(findings: Findings) -> list[Cause]:
    names = list(findings.misplaced)
    if not names:
        return []
    sentence = (
        f"Updates were added to the wrong parameters: {names[0]} got that of "
        f"{findings.misplaced[names[0]]}"
    )
    sentence += f", and {len(names) - 1} more are mixed up." if names[1:] else "."
    evidence = {"parameters": names, "update_of": findings.misplaced}
    return [Cause("misplaced", sentence, evidence, len(names))]


def _reordered(findings: Findings) -> list[Cause]:
    names = list(findings.reordered)
    if not names:
        return []
    sentence = (
        f"Weights are in the wrong place: {names[0]} holds those of {findings.reordered[names[0]]}"
    )
    sentence += f", and {len(names) - 1} more are mixed up." if names[1:] else "."
    evidence = {"parameters": names, "weights_of": findings.reordered}
    return [Cause("reordered", sentence, evidence, len(names))]


def _reordered_lines(findings: Findings) -> list[Cause]:
    causes = []
    for what in dict.fromkeys(findings.reordered_lines.values()):
        names = [name for name, found in findings.reordered_lines.items() if found == what]
        if what == TURNED:
            sentence = (
                f"The weights are stored transposed in {whole(names, findings)}: (in, out) where "
                "the base has (out, in), or the reverse."
            )
            evidence = {"parameters": names, "whole_weights": True}
            causes.append(Cause("transposed", sentence, evidence, len(names)))
            continue
        tokens = all(_OF_TOKENS.search(name) for name in names)
        why = (
            "the tokens are numbered otherwise"
            if tokens
            else (
                "the heads of an attention are laid out otherwise (Meta's or GGUF's for rotary "
                "embeddings, fused projections)"
            )
        )
        sentence = f"The {what} are in another order in {whole(names, findings)}, as where {why}."
        evidence = {f"{what.split()[0]}_of": names}
        causes.append(Cause("reordered", sentence, evidence, len(names)))
    return causes


def _shared(findings: Findings) -> list[Cause]:
    return [
        Cause(
            "tied",
            f"The update of {source} was added to {name} as well: the two are tied, and a merge in "
            "place, such as PEFT's, changes the memory that they share. merge_lora.py gives the "
            "head weights of its own.",
            {"parameters": [name], "update_of": {name: source}},
            1,
        )
        for name, source in findings.shared.items()
    ]


def _unmerged_again(findings: Findings) -> list[Cause]:
    causes = []
    for reading, effect in (
        (UNMERGED_AGAIN, "only the rounding of that is left"),
        (REMERGED, "each time it was rounded"),
    ):
        names = [n for n, found in findings.merges.items() if reading in found.merge.readings]
        names += [n for n, test in findings.factors.items() if _undone(test) == reading]
        if names:
            sentence = f"The adapter was {reading} in {whole(names, findings)}: {effect}."
            evidence = {"parameters": names, "reading": reading}
            causes.append(Cause("merged_and_unmerged", sentence, evidence, len(names)))
    return causes


def _undone(test: FactorTest) -> str | None:
    """Which of the two it was, if one."""
    if test.vanishes:
        return UNMERGED_AGAIN
    return REMERGED if test.sums > 1 and test.allows(1.0) else None
