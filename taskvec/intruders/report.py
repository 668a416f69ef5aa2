"""What find_intruder_dimensions.py found, as the content of its JSON and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from taskvec.intruders.analysis import MatrixFindings, Settings
from taskvec.intruders.basesvd import EQUAL
from taskvec.intruders.tuned import Tuned

Document = dict[str, Any]
Pictures = Mapping[str, Mapping[str, torch.Tensor]]  # by matrix, by label

COLUMNS = (
    "version",
    "matrix",
    "layer",
    "block",
    "module",
    "shape",
    "j",
    "singular_value",
    "max_similarity",
    "nearest_base_vector",
    "outside",
    "tested",
    "intruder",
)


def document(
    inputs: dict[str, Any],
    settings: Settings,
    tuned: Sequence[Tuned],
    found: Sequence[MatrixFindings],
) -> Document:
    """The JSON document: settings, a summary for each version, every matrix, one picture.

    ``found`` holds the matrices that at least one version changed.
    """
    pictures = {
        one.name: {
            label: finding.picture
            for label, finding in one.versions.items()
            if finding.picture is not None
        }
        for one in found
    }
    content: Document = {
        "inputs": inputs,
        "settings": {
            "top_k": settings.top_k,
            "epsilons": list(settings.epsilons),
            "leading": settings.leading,
            "equal_singular_values": EQUAL,
        },
        "matrices": {one.name: one.base for one in found},
        "versions": {
            one.label: {
                "kind": one.kind,
                "source": one.source,
                "matrices": {each.name: each.versions[one.label].entry for each in found},
            }
            for one in tuned
        },
    }
    content["summary"] = _summary(content)
    content["picture"] = _picture(content, pictures)
    return content


def rows(content: Document) -> Iterator[dict[str, Any]]:
    """A line for each leading vector of each matrix that changed, for the CSV file."""
    settings = content["settings"]
    first = epsilon_key(settings["epsilons"][0])
    for label, version in content["versions"].items():
        for name, entry in version["matrices"].items():
            if not entry["changed"]:
                continue
            where = {key: content["matrices"][name][key] for key in COLUMNS[2:6]}
            for j in range(1, len(entry["singular_values"]) + 1):
                yield {
                    "version": label,
                    "matrix": name,
                    **where,
                    "j": j,
                    "singular_value": entry["singular_values"][j - 1],
                    "max_similarity": entry["max_similarity"][j - 1],
                    "nearest_base_vector": entry["nearest_base_vector"][j - 1],
                    "outside": entry["outside"][j - 1],
                    "tested": j <= settings["top_k"],
                    "intruder": j in entry["intruders"][first],
                }


def epsilon_key(epsilon: float) -> str:
    """What the document calls the counts at an epsilon."""
    return f"{epsilon:g}"


def count(content: Document, label: str, epsilon: float, top_k: int) -> int:
    """Intruders of a version at any epsilon and any k up to the vectors that were looked at."""
    return sum(
        sum(value < epsilon for value in entry["max_similarity"][:top_k])
        for entry in content["versions"][label]["matrices"].values()
        if entry["changed"]
    )


def _summary(content: Document) -> dict[str, Any]:
    matrices = content["matrices"].values()
    return {
        "matrices": len(matrices),
        "matrices_with_outputs_without_base": sum(
            entry["outputs_without_base"] > 0 for entry in matrices
        ),
        "versions": {label: _version_summary(content, label) for label in content["versions"]},
    }


def _version_summary(content: Document, label: str) -> dict[str, Any]:
    epsilons, top_k = content["settings"]["epsilons"], content["settings"]["top_k"]
    entries = content["versions"][label]["matrices"]
    changed = [entry for entry in entries.values() if entry["changed"]]
    first = epsilon_key(epsilons[0])
    by_layer: Counter[str] = Counter()
    for name, entry in entries.items():
        by_layer[str(content["matrices"][name]["layer"])] += len(entry["intruders"][first])
    tested = [value for entry in changed for value in entry["max_similarity"][:top_k]]
    return {
        "changed_matrices": len(changed),
        "tested_vectors": len(tested),
        "intruders": {
            epsilon_key(epsilon): sum(
                len(entry["intruders"][epsilon_key(epsilon)]) for entry in entries.values()
            )
            for epsilon in epsilons
        },
        "matrices_with_intruders": sum(bool(e["intruders"][first]) for e in entries.values()),
        "intruders_outside": sum(
            entry["outside"][j - 1] >= epsilons[0]
            for entry in changed
            for j in entry["intruders"][first]
        ),
        "intruders_by_layer": dict(by_layer),
        "mean_max_similarity": sum(tested) / len(tested) if tested else None,
    }


def _picture(content: Document, pictures: Pictures) -> dict[str, Any] | None:
    """The similarity matrices of the matrix with the most intruders, or of a middle one."""
    first = epsilon_key(content["settings"]["epsilons"][0])

    def intruders(name: str) -> int:
        return sum(
            len(version["matrices"][name]["intruders"][first])
            for version in content["versions"].values()
        )

    names: Iterable[str] = content["matrices"]
    ordered = sorted(names, key=lambda name: -intruders(name))
    if not ordered:
        return None
    name = ordered[0] if intruders(ordered[0]) else ordered[len(ordered) // 2]
    return {
        "matrix": name,
        "similarity": {
            label: [[round(value, 4) for value in row] for row in picture.tolist()]
            for label, picture in pictures[name].items()
        },
    }
