"""The figures: they say what the document says, and can be read whatever the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import rgb_to_hsv, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.markers import MarkerStyle
from PIL import Image

from taskvec.figures import comparison, titles
from taskvec.figures import style as look
from tests.plot_documents import EDGE_CASES, NEGATED, ZEROED, made_up, real_documents
from tests.readable import assert_readable

SINGLE = (
    comparison.cosine_similarity,
    comparison.norm_distribution,
    comparison.modification_heatmap,
    comparison.architecture_coverage,
)
PER_PRECISION = (comparison.rounding_errors, comparison.precision_impact)


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return real_documents()


def test_the_made_up_documents_have_only_what_real_ones_have(documents):
    def paths(content: Any, prefix: str = "") -> set[str]:
        if not isinstance(content, dict):
            return set()
        return {
            path
            for key, value in content.items()
            for path in ({f"{prefix}.{key}"} | paths(value, f"{prefix}.{key}"))
        }

    real = copy.deepcopy(documents["negated"])
    fake = made_up([NEGATED, ZEROED], [NEGATED, ZEROED])
    for content in (real, fake):
        content["parameters"] = content["parameters"][NEGATED]
    assert paths(fake) <= paths(real)


# Every figure


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out, but no PNG is written: that takes most of the time."""
    monkeypatch.setattr(look.Page, "save", lambda page, path: page.figure)


def drawn(draw: Any, content: dict[str, Any], path: Path) -> Figure:
    precision = content["summary"]["certificate"]["precision"]
    return draw({precision: content} if draw in PER_PRECISION else content, path)


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def title_of(figure: Figure) -> str:
    """The title as one line with ordinary spaces."""
    largest = max(figure.texts, key=lambda text: text.get_size())
    return " ".join(largest.get_text().split())


@pytest.mark.parametrize("draw", [*SINGLE, *PER_PRECISION], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", ["fp16", "zeroed"])
def test_a_figure_is_a_png_of_a_page_whose_texts_stand_apart(documents, draw, name, tmp_path):
    path = tmp_path / "figure.png"
    figure = drawn(draw, documents[name], path)
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"
        assert image.width == 1500 and 300 <= image.height <= 2000
    assert_readable(figure)


@pytest.mark.parametrize("draw", SINGLE, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_any_architecture_can_be_read(draw, case, unwritten, tmp_path):
    assert_readable(drawn(draw, EDGE_CASES[case], tmp_path / "figure.png"))


@pytest.mark.parametrize("draw", PER_PRECISION, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("case", ["no parameter at all", "one parameter", "everything violated"])
def test_any_precision_can_be_read(draw, case, unwritten, tmp_path):
    assert_readable(drawn(draw, EDGE_CASES[case], tmp_path / "figure.png"))


@pytest.mark.parametrize("draw", [*SINGLE, *PER_PRECISION], ids=lambda draw: draw.__name__)
def test_a_failed_certificate_is_said_first_and_names_the_parameter(
    documents, draw, unwritten, tmp_path
):
    passed = drawn(draw, documents["fp32"], tmp_path / "passed.png")
    failed = drawn(draw, documents["negated"], tmp_path / "failed.png")
    assert not any("FAILED" in text for text in texts_of(passed))
    assert "✗ VALIDATION FAILED" in texts_of(failed)
    if draw is comparison.rounding_errors:
        assert title_of(failed).startswith("Beyond the rounding bound: 1,0")
    else:
        assert "layer 1 q_proj" in title_of(failed)


def test_a_figure_depends_on_the_document_alone(documents, tmp_path):
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    comparison.norm_distribution(documents["fp16"], first)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        comparison.norm_distribution(documents["fp16"], second)
        assert dict(matplotlib.rcParams) == before
    assert first.read_bytes() == second.read_bytes()


def test_purple_and_red_differ_in_lightness_too():
    def luminance(color: str) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
                  for v in to_rgba(color)[:3]]  # fmt: skip
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    contrast = (luminance(look.RED) + 0.05) / (luminance(look.PURPLE) + 0.05)
    assert contrast > 2


# What each figure shows


def collections_in(figure: Figure, color: str) -> list[PathCollection]:
    wanted = np.array(to_rgba(color)[:3])
    return [
        found
        for ax in figure.axes
        for found in ax.collections
        if isinstance(found, PathCollection)
        and len(found.get_offsets())
        and np.allclose(found.get_facecolor()[0][:3], wanted)
    ]


def crosses_in(figure: Figure) -> int:
    return sum(len(found.get_offsets()) for found in collections_in(figure, look.INK))


def shape_of(collection: PathCollection) -> np.ndarray:
    return np.asarray(collection.get_paths()[0].vertices)


def test_norms_of_shared_parameters_are_purple_circles_and_others_red_triangles(
    documents, unwritten, tmp_path
):
    content = documents["fp16"]
    figure = comparison.norm_distribution(content, tmp_path / "norms.png")
    (shared,) = collections_in(figure, look.PURPLE)
    (others,) = collections_in(figure, look.RED)
    summary = content["summary"]
    assert len(shared.get_offsets()) == summary["shared_parameters"] == 8
    assert len(others.get_offsets()) == summary["task_vector_only_parameters"]
    for collection, marker in ((shared, "o"), (others, "^")):
        style = MarkerStyle(marker)
        assert len(shape_of(collection)) == len(
            style.get_path().transformed(style.get_transform()).vertices
        )
    norms = [e["task_vector_norm"] for e in content["parameters"].values() if e["lora"]]
    assert sorted(shared.get_offsets()[:, 1]) == pytest.approx(sorted(norms))


def test_norms_say_how_many_parameters_are_of_each_kind(documents, unwritten, tmp_path):
    figure = comparison.norm_distribution(documents["fp32"], tmp_path / "norms.png")
    total = documents["fp32"]["summary"]["total_parameters"]
    texts = texts_of(figure)
    assert "shared (adapter and task vector): 8" in texts
    assert "task vector only: 0" in texts
    assert f"unchanged, ‖T‖ = 0: {total - 8}" in texts
    assert not collections_in(figure, look.RED)


def cells_in(figure: Figure) -> np.ndarray:
    """RGB of every cell that a parameter fills, over the grid and what is outside of it."""
    found = [image.get_array() for image in figure.findobj(AxesImage)]
    cells = np.concatenate([np.asarray(a).reshape(-1, 4) for a in found if a.dtype == np.float64])
    return np.asarray(cells[cells[:, 3] == 1][:, :3])


def cells_by_colour(figure: Figure) -> dict[str, int]:
    hue, saturation, _ = rgb_to_hsv(cells_in(figure)).T
    return {
        "purple": int(((saturation > 0.1) & (hue > 0.65) & (hue < 0.85)).sum()),
        "red": int(((saturation > 0.1) & ((hue < 0.1) | (hue > 0.95))).sum()),
        "grey": int((saturation < 0.01).sum()),
    }


def test_the_heatmap_has_one_cell_per_parameter_coloured_by_cause(documents, unwritten, tmp_path):
    for name in ("fp32", "fp16"):
        content = documents[name]
        summary = content["summary"]
        figure = comparison.modification_heatmap(content, tmp_path / "heatmap.png")
        colours = cells_by_colour(figure)
        assert len(cells_in(figure)) - 2 * 128 == summary["total_parameters"]  # and the scale
        assert colours["purple"] - 128 == summary["shared_parameters"]
        assert colours["red"] - 128 == summary["task_vector_only_parameters"]
        assert colours["grey"] == summary["total_parameters"] - summary["nonzero_parameters"]


@pytest.mark.parametrize("case", ["64 experts", "encoder and decoder", "no numbered layers"])
def test_no_two_parameters_share_a_cell(case, unwritten, tmp_path):
    content = EDGE_CASES[case]
    figure = comparison.architecture_coverage(content, tmp_path / "coverage.png")
    colours = cells_by_colour(figure)
    assert len(cells_in(figure)) == len(content["parameters"])
    assert colours["purple"] == content["summary"]["lora_parameters"]


def test_a_darker_cell_is_a_larger_change(unwritten, tmp_path):
    names = [f"h.{layer}.a.weight" for layer in range(5)]
    content = made_up(names, names, norm=1e-4)
    figure = comparison.modification_heatmap(content, tmp_path / "heatmap.png")
    lightness = cells_in(figure)[:5].sum(axis=1)
    assert (np.diff(lightness) < 0).all()  # made_up's norms grow from layer to layer


def test_every_failed_parameter_carries_a_cross(documents, unwritten, tmp_path):
    for draw in (comparison.modification_heatmap, comparison.architecture_coverage):
        assert crosses_in(draw(documents["fp32"], tmp_path / "a.png")) == 0
        assert crosses_in(draw(documents["zeroed"], tmp_path / "a.png")) == 1
        assert crosses_in(draw(documents["nothing"], tmp_path / "a.png")) == 8


def test_cosines_are_drawn_as_their_distance_from_one(documents, unwritten, tmp_path):
    content = documents["fp16"]
    figure = comparison.cosine_similarity(content, tmp_path / "cosines.png")
    points = [c.get_offsets() for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    drawn_distances = np.concatenate(points)[:, 1]
    cosines = [e["lora"]["cosine_similarity"] for e in content["parameters"].values() if e["lora"]]
    assert sorted(drawn_distances) == pytest.approx(sorted(1 - cosine for cosine in cosines))
    assert figure.axes[0].get_yscale() == "log"


def test_a_cosine_of_exactly_one_and_one_that_is_undefined_have_their_places(unwritten, tmp_path):
    names = ["h.0.a.weight", "h.1.a.weight"]
    exact = comparison.cosine_similarity(made_up(names, names), tmp_path / "a.png")
    undefined = comparison.cosine_similarity(made_up(names, names, cosine=None), tmp_path / "b.png")
    for figure, label in ((exact, "exactly 1"), (undefined, "undefined")):
        ax = figure.axes[0]
        heights = {height for c in ax.collections for height in c.get_offsets()[:, 1]}
        ticks = {text.get_text(): tick for tick, text in zip(
            ax.get_yticks(), ax.get_yticklabels(), strict=True)}  # fmt: skip
        assert heights == {ticks[label]}
    assert "undefined" not in texts_of(exact)


def steps_in(figure: Figure, panel: int) -> list[list[float]]:
    """The bars of a panel of the ulp figure, empty bins as zeros."""
    patches = figure.axes[panel].patches
    return [list(np.nan_to_num(patch.get_data().values)) for patch in patches]


def test_the_ulp_histograms_are_the_document_s(documents, unwritten, tmp_path):
    contents = {name: documents[name] for name in ("fp32", "fp16", "bf16")}
    figure = comparison.rounding_errors(contents, tmp_path / "ulps.png")
    assert len(figure.axes) == 3
    for panel, content in enumerate(contents.values()):
        certificate = content["summary"]["certificate"]
        histogram = certificate["ulp_histogram"]
        error, error_beyond, bound, bound_beyond = steps_in(figure, panel)
        assert error + error_beyond == histogram["error"]
        assert bound + bound_beyond == histogram["bound"]
        assert sum(error + error_beyond) == certificate["elements_checked"]
        edges = figure.axes[panel].patches[0].get_data().edges
        assert edges[-1] == pytest.approx(3.0)


def test_weights_beyond_their_bound_get_a_bar_of_their_own(documents, unwritten, tmp_path):
    figure = comparison.rounding_errors({"fp32": documents["negated"]}, tmp_path / "ulps.png")
    violations = documents["negated"]["summary"]["certificate"]["violations"]
    assert violations > 1000
    assert steps_in(figure, 0)[-1] == [violations]
    assert f"{violations:,}" in texts_of(figure)


def test_precision_impact_splits_the_parameters_into_real_artifact_and_unchanged(
    documents, unwritten, tmp_path
):
    contents = {name: documents[name] for name in ("fp32", "fp16")}
    figure = comparison.precision_impact(contents, tmp_path / "impact.png")
    total = documents["fp32"]["summary"]["total_parameters"]
    widths = [round(patch.get_width()) for patch in figure.axes[0].patches]
    assert widths == [8, total - 8, 8, total - 8]
    hatched = [bool(patch.get_hatch()) for patch in figure.axes[0].patches]
    assert hatched == [False, False, False, True]
    assert title_of(figure) == (
        f"Why {total} when the adapter has 8? "
        f"The other {total - 8} are the base's own rounding to fp16"
    )


def test_precision_impact_never_shows_a_lossy_merge_as_whole(documents, unwritten, tmp_path):
    figure = comparison.precision_impact({"fp32": documents["fp32"]}, tmp_path / "impact.png")
    error = documents["fp32"]["summary"]["relative_error"]
    assert 0 < error < 1e-4
    assert any(text.startswith("99.999") and text.endswith("%") for text in texts_of(figure))
    assert "100 %" not in texts_of(figure)
    assert titles.kept(1e-12) != titles.kept(0.0) == "100 %"
