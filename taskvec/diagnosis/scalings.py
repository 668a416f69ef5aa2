"""Updates that were scaled wrongly, grouped by the factor or by the reason for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from taskvec.adapter import Adapter
from taskvec.diagnosis.cause import Cause, whole
from taskvec.diagnosis.findings import Findings
from taskvec.diagnosis.merges import REMERGED, UNMERGED_AGAIN, readings

# A factor that comes of several roundings is not met exactly; no two readings are so near.
_SLACK = 1e-5


@dataclass
class _Scaled:
    """Parameters that were scaled by one factor, or wrongly for one reason."""

    readings: list[str]
    low: float
    high: float
    names: list[str] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    reproduced: list[float] = field(default_factory=list)

    def takes(self, other: _Scaled) -> bool:
        if self.readings or other.readings:
            return bool(set(self.readings) & set(other.readings))
        return max(self.low, other.low) <= min(self.high, other.high)

    def take(self, other: _Scaled) -> None:
        self.readings = [text for text in self.readings if text in other.readings]
        self.low, self.high = max(self.low, other.low), min(self.high, other.high)
        self.names += other.names
        self.factors += other.factors
        self.reproduced += other.reproduced


def scaled(findings: Findings, adapter: Adapter) -> list[Cause]:
    groups: list[_Scaled] = []
    for single in [*_scaled_by_bits(findings), *_scaled_by_bounds(findings, adapter)]:
        group = next((group for group in groups if group.takes(single)), None)
        if group is None:
            groups.append(single)
        else:
            group.take(single)
    return [_scaled_cause(findings, adapter, group) for group in groups]


def _scaled_by_bits(findings: Findings) -> list[_Scaled]:
    found = []
    for name, agreement in findings.merges.items():
        merge = agreement.merge
        if merge.readings and not {UNMERGED_AGAIN, REMERGED} & set(merge.readings):
            factor = sum(merge.scalings) / (findings.scaling(name) or 1.0)
            share = 1 - agreement.missed_share
            found.append(_Scaled(list(merge.readings), factor, factor, [name], [factor], [share]))
    return found


def _scaled_by_bounds(findings: Findings, adapter: Adapter) -> list[_Scaled]:
    found = []
    rslora = bool(adapter.config.values.get("use_rslora"))
    for name, test in findings.factors.items():
        if (
            test.vanishes or test.plain or test.allows(1.0)
        ):  # another of the test's assumptions explains T
            continue
        scaling, rank = findings.scaling(name), test.update.rank
        texts = []
        if scaling and rank:
            texts = [
                text
                for value, names in readings(scaling, rank, rslora).items()
                if test.allows(value / scaling, _SLACK)
                for text in names
            ]
        found.append(_Scaled(texts, test.low, test.high, [name], [test.factor]))
    return found


def _scaled_cause(findings: Findings, adapter: Adapter, group: _Scaled) -> Cause:
    low, high = min(group.factors), max(group.factors)
    by = f"{low:.6g}" if high - low <= 1e-6 * abs(low) else f"{low:.6g} to {high:.6g}"
    words = (
        f": {'; or '.join(group.readings)}" if group.readings else _other_alpha(adapter, low, high)
    )
    sentence = f"The adapter was scaled by {by} in {whole(group.names, findings)}{words}."
    evidence = {
        "factor": group.factors[0],
        "factors": dict(zip(group.names, group.factors, strict=True)),
        "readings": group.readings,
        "parameters": group.names,
        "reproduced_share": min(group.reproduced) if group.reproduced else None,
    }
    return Cause("scaled", sentence, evidence, len(group.names))


def _other_alpha(adapter: Adapter, low: float, high: float) -> str:
    """The alpha that would have scaled so, if it is a whole number."""
    alpha = adapter.config.values.get("lora_alpha")
    patterns = any(config.values.get("alpha_pattern") for config in adapter.configs)
    if len(adapter.configs) > 1 or patterns or not isinstance(alpha, int | float):
        return ""
    other = round(alpha * low)
    if other < 1 or max(abs(alpha * low - other), abs(alpha * high - other)) > 1e-3 * other:
        return ""
    return f": as lora_alpha {other} would do, where adapter_config.json has {alpha:g}"
