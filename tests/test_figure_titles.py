"""The titles of the figures: the finding in one sentence, with its numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from taskvec.figures import style, titles
from tests.plot_documents import real_documents


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return real_documents()


def test_titles_state_the_findings_of_a_merge_that_holds(documents):
    fp32, fp16 = documents["fp32"], documents["fp16"]
    total = fp32["summary"]["total_parameters"]
    title = titles.cosine_similarity(fp32).title
    assert title.startswith("All 8 adapted parameters point where the adapter says: cosine ≥ 0.999")
    assert titles.modification_heatmap(fp32).title == (
        f"8 of {total} parameters changed, all by the adapter (q_proj, k_proj, v_proj and o_proj "
        "in all 2 layers); the rest is bit for bit the base's"
    )
    assert titles.modification_heatmap(fp16).title == (
        f"All {total} parameters changed: 8 by the adapter (q_proj, k_proj, v_proj and o_proj "
        f"in all 2 layers), {total - 8} by rounding alone"
    )
    assert titles.norm_distribution(fp16).title.startswith(
        f"{total - 8} parameters changed by rounding alone, beside the adapter's 8: median ‖T‖ "
    )
    checked = 2 * (32 * 32 * 2 + 16 * 32 * 2)  # q and o, k and v, in two layers
    assert titles.rounding_errors({"fp32": fp32}).title.startswith(
        f"Each of the {checked:,} adapted weights is within its rounding bound in fp32"
    )


def test_the_coverage_title_has_the_shares_of_starcoder2_3b(documents):
    content = copy.deepcopy(documents["fp32"])
    content["summary"]["lora_coverage"] = {"tensors": 120 / 483, "elements": 613416960 / 3030371328}
    content["summary"]["storage"].update(
        adapter_bytes=4 * 4546560, dense_task_vector_bytes=4 * 3030371328
    )
    assert titles.architecture_coverage(content).title == (
        "The adapter touches 24.84 % of the tensors, 20.24 % of the elements, and stores 0.15 % "
        "of the bytes"
    )


def test_titles_name_what_failed(documents):
    assert titles.norm_distribution(documents["zeroed"]).title == (
        "1 of 8 adapted parameters did not change (layer 0 v_proj)"
    )
    nothing = titles.norm_distribution(documents["nothing"]).title
    assert nothing.startswith("8 of 8 adapted parameters did not change (layer 0 ")
    negated = titles.cosine_similarity(documents["negated"])
    assert negated.failed and negated.title.endswith("(layer 1 q_proj), cosine −1.0000")


@pytest.mark.parametrize(
    ("cosine", "text"),
    [
        (1 - 4e-15, "0.999999999999"),
        (1 - 2.5e-7, "0.9999997"),
        (0.99926, "0.9992"),
        (0.9, "0.9"),
        (0.873, "0.87"),
        (-0.5, "-0.50"),
    ],
)
def test_a_cosine_is_rounded_down(cosine, text):
    assert titles.floored(cosine) == text
    assert float(text) <= cosine


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "layer 7 q_proj"),
        ("model.layers.7.self_attn.q_proj.bias", "layer 7 q_proj.bias"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.layers.3.mlp.experts.5.w1.weight", "layer 3 5.w1"),
        ("h.0.weight", "layer 0 weight"),
        ("weight", "weight"),
    ],
)
def test_short_names_are_what_people_say(name, text):
    assert titles.short_name(name) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-3, "0.001"), (1.84e-5, "1.8×10⁻⁵"), (1e6, "10⁶"), (12345.6, "12,346")],
)
def test_numbers_are_written_for_people(value, text):
    assert style.scientific(value, 0 if math.log10(value or 1).is_integer() else 1) == text
