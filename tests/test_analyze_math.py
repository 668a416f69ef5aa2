"""The mathematical analysis of tiny merges, against numpy on the files that it reads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import analyze_lora_vs_task_vector_math as script
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.cli import UserError
from taskvec.figures import mathematics as figures
from taskvec.figures import spectra
from taskvec.figures import style as look
from taskvec.mathematics import identities
from taskvec.mathematics.document import module_labels
from taskvec.mathematics.report import finding
from tests.checks import edit_tensors, names
from tests.readable import assert_readable

RANK = 4
ROOT = Path(__file__).parent.parent


class Chain:
    """Steps 1 to 3 in a directory, and the analysis of what they wrote."""

    def __init__(self, folder, base, lora, *, precision, rounding="once", base_precision="stored"):
        self.folder, self.base = folder, base
        merge(str(base), str(lora), folder / "merged", precision=precision, rounding=rounding)
        extract(str(base), str(folder / "merged"), folder / "vector", base_precision=base_precision)
        self.compare(lora)

    def compare(self, lora):
        compare(
            str(self.base),
            str(lora),
            self.folder / "comparison",
            task_vector_path=self.vector,
            generate_plots=False,
            detailed_report=False,
        )

    @property
    def deltas(self):
        return self.folder / "comparison" / "lora_deltas.safetensors"

    @property
    def vector(self):
        return self.folder / "vector" / "task_vector.safetensors"

    def analyze(self, name="out", **options):
        return script.analyze(self.deltas, self.vector, self.folder / name, device="cpu", **options)


@pytest.fixture(scope="module")
def starcoder2(tiny):
    return tiny.base("starcoder2")


@pytest.fixture(scope="module")
def lora(tiny, starcoder2):
    return tiny.adapter(starcoder2, scale=0.002)


@pytest.fixture(scope="module")
def chain(starcoder2, lora, tmp_path_factory):
    """A `Chain` by its settings, each made once."""
    made: dict[str, Chain] = {}

    def make(base=starcoder2, adapter=lora, **settings):
        key = f"{base} {adapter} {settings}"
        if key not in made:
            made[key] = Chain(tmp_path_factory.mktemp("chain"), base, adapter, **settings)
        return made[key]

    return make


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longest, and most tests do not look."""
    monkeypatch.setattr(figures, "draw", lambda document, directory: {})


@pytest.fixture(scope="module")
def fp16(chain):
    return chain(precision="fp16").analyze("fp16")


@pytest.fixture(scope="module")
def tensors(chain, starcoder2):
    """T, delta and the merged weights of the fp16 chain in float64, by name."""
    made = chain(precision="fp16")
    deltas, vector = load_file(made.deltas), load_file(made.vector)
    merged = load_file(made.folder / "merged" / "model.safetensors")
    return {
        name: (vector[name].astype(float), delta.astype(float), merged[name])
        for name, delta in deltas.items()
    }


def pooled(tensors):
    return tuple(np.concatenate([t[i].ravel() for t in tensors.values()]) for i in (0, 1))


# The elements


def test_the_files_are_those_of_the_contract(fp16):
    assert names(fp16.output_dir) == sorted(
        ["mathematical_analysis.json", "mathematical_analysis.md", *figures.CAPTIONS]
    )


def check_elements(entry, T, D):
    E = T - D
    assert entry["elements"] == T.size
    assert entry["cosine_similarity"] == pytest.approx(
        (T @ D) / np.linalg.norm(T) / np.linalg.norm(D), rel=1e-12
    )
    assert entry["pearson_correlation"] == pytest.approx(np.corrcoef(T, D)[0, 1], rel=1e-10)
    slope, intercept = np.linalg.lstsq(np.stack([D, np.ones_like(D)], 1), T, rcond=None)[0]
    assert entry["slope"] == pytest.approx(slope, rel=1e-9)
    assert entry["intercept"] == pytest.approx(intercept, rel=1e-5, abs=1e-14)
    assert entry["slope_through_origin"] == pytest.approx((T @ D) / (D @ D), rel=1e-12)
    assert entry["relative_error"] == pytest.approx(np.linalg.norm(E) / np.linalg.norm(D))
    assert entry["snr_db"] == pytest.approx(10 * np.log10((D @ D) / (E @ E)), rel=1e-9)
    assert entry["max_absolute_difference"] == np.abs(E).max()
    assert entry["mean_absolute_difference"] == pytest.approx(np.abs(E).mean())
    assert entry["exact_share"] == pytest.approx((T == D).mean())
    assert entry["same_sign_share"] == pytest.approx((T * D > 0).sum() / (D != 0).sum())
    for name, x in (("task_vector", T), ("delta", D), ("residual", E)):
        moments, centred = entry["moments"][name], x - x.mean()
        assert moments["mean"] == pytest.approx(x.mean(), rel=1e-6, abs=1e-12)
        assert moments["std"] == pytest.approx(x.std(), rel=1e-9)
        assert moments["skewness"] == pytest.approx((centred**3).mean() / x.std() ** 3, abs=1e-6)
        assert moments["kurtosis"] == pytest.approx((centred**4).mean() / x.std() ** 4, rel=1e-6)
        quantiles = entry["quantiles"][name]
        assert quantiles["method"] == "exact"
        for probability, value in quantiles["values"].items():
            expected = np.quantile(x, float(probability))
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_every_parameter_is_what_numpy_says(fp16, tensors):
    assert list(fp16.document["parameters"]) == list(tensors)
    for name, (T, D, _) in tensors.items():
        check_elements(fp16.document["parameters"][name], T.ravel(), D.ravel())


def test_the_totals_are_those_of_all_elements_together(fp16, tensors):
    check_elements(fp16.document["summary"], *pooled(tensors))


def test_the_residual_is_in_ulps_of_the_merged_weight(fp16, tensors):
    """numpy's spacing of the fp16 number itself; at a power of two it is that above."""
    for name, (T, D, M) in tensors.items():
        ulps = np.abs(T - D) / np.abs(np.spacing(M)).astype(float)
        entry = fp16.document["parameters"][name]["residual_in_ulps"]
        assert entry["rms"] == pytest.approx(np.sqrt((ulps**2).mean()), rel=1e-9)
        assert entry["max"] == pytest.approx(ulps.max(), rel=1e-9)
        assert entry["share_within_half"] == pytest.approx((ulps <= 0.501).mean())


def test_rounding_spreads_evenly_over_an_ulp(fp16):
    """rms 1/sqrt(12) of an ulp; the histogram is the box from -1/2 to 1/2."""
    assert fp16.document["summary"]["residual_in_ulps"]["rms"] == pytest.approx(
        1 / math.sqrt(12), rel=0.03
    )
    counts = np.array(fp16.document["histograms"]["residual_in_ulps"]["counts"])
    assert counts[40:80].sum() == counts.sum() == fp16.document["summary"]["elements"]
    assert counts[40:80].min() > 0.7 * counts.sum() / 40


def test_the_joint_histogram_counts_every_element(fp16):
    joint = fp16.document["histograms"]["joint"]
    counts = np.array([[int(c) for c in line.split()] for line in joint["counts"]])
    assert counts.sum() == fp16.document["summary"]["elements"]
    assert counts.shape[0] == np.diff(joint["delta_bins"])[0]
    assert counts.shape[1] == np.diff(joint["task_vector_bins"])[0]


# The spectra


def test_the_spectra_are_numpys(fp16, tensors):
    for name, (T, D, _) in tensors.items():
        entry = fp16.document["parameters"][name]["spectra"]
        (Ut, St, Vt), (Ud, Sd, Vd) = np.linalg.svd(T), np.linalg.svd(D)
        np.testing.assert_allclose(entry["task_vector"]["values"], St[: 2 * RANK], rtol=1e-9)
        at = np.array(entry["task_vector"]["index"]) - 1
        np.testing.assert_allclose(entry["task_vector"]["curve"], St[at], rtol=1e-9)
        assert at[0] == 0 and at[-1] == len(St) - 1
        np.testing.assert_allclose(entry["delta"]["values"][:RANK], Sd[:RANK], rtol=1e-9)
        p = St / St.sum()
        assert entry["task_vector"]["effective_rank"] == pytest.approx(
            np.exp(-(p * np.log(p)).sum())
        )
        assert entry["task_vector"]["stable_rank"] == pytest.approx((St**2).sum() / St[0] ** 2)
        assert entry["residual_norm"] == pytest.approx(np.linalg.norm(T - D, 2))
        cosines = np.linalg.svd(Ut[:, :RANK].T @ Ud[:, :RANK], compute_uv=False)
        angles = np.degrees(np.arccos(np.minimum(cosines, 1)))
        np.testing.assert_allclose(entry["left_principal_angles_degrees"], angles, atol=1e-5)
        diagonal = [
            ((Vt[:i] @ Vd[:i].T) ** 2).sum() / i for i in range(1, RANK + 1)
        ]  # numpy's third factor has the vectors as rows
        np.testing.assert_allclose(entry["right_similarity_diagonal"], diagonal, rtol=1e-9)
        cut = (Ut[:, :RANK] * St[:RANK]) @ Vt[:RANK]
        assert entry["recovery_error"] == pytest.approx(np.linalg.norm(cut - D), rel=1e-9)
        assert entry["tail_direct"] == pytest.approx(np.linalg.norm(T - cut), rel=1e-9)


def test_the_amplification_factor_is_that_of_the_base(fp16, tensors, starcoder2):
    base = load_file(starcoder2 / "model.safetensors")
    for name, (_, D, _) in tensors.items():
        U, S, V = np.linalg.svd(D)
        projected = U[:, :RANK].T @ base[name].astype(float) @ V[:RANK].T
        expected = np.linalg.norm(S) / np.linalg.norm(projected)
        entry = fp16.document["parameters"][name]["spectra"]
        assert entry["amplification"] == pytest.approx(expected, rel=1e-6)
        assert entry["base_norm"] == pytest.approx(np.linalg.norm(base[name].astype(float)))


def test_the_floor_is_predicted_from_the_merged_weights_alone(fp16, tensors):
    for name, (_, _, M) in tensors.items():
        variance = np.abs(np.spacing(M)).astype(float) ** 2 / 12
        floor = fp16.document["parameters"][name]["spectra"]["floors"]["residual"]
        rms, (m, n) = math.sqrt(variance.mean()), M.shape
        assert floor["rms"] == pytest.approx(rms, rel=1e-3)
        assert floor["edge"] == pytest.approx(rms * (math.sqrt(m) + math.sqrt(n)), rel=1e-3)
        longest = math.sqrt(variance.sum(1).max()) + math.sqrt(variance.sum(0).max())
        assert floor["threshold"] == pytest.approx(longest, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_rank_found_is_the_adapters(chain, precision, no_figures):
    """Wherever delta's smallest singular value stands above the predicted floor: here, always."""
    result = chain(precision=precision).analyze()
    for entry in result.document["parameters"].values():
        spectra = entry["spectra"]
        assert entry["precision"] == precision and entry["adapter_rank"] == RANK
        assert spectra["delta"]["values"][RANK - 1] > spectra["floors"]["task_vector"]["threshold"]
        assert spectra["delta"]["numerical_rank"] == RANK
        assert spectra["task_vector"]["numerical_rank"] == RANK
        assert spectra["residual_norm"] < spectra["floors"]["residual"]["threshold"]
    assert result.document["summary"]["spectra"]["residual_nature"] == "random"
    assert f"exactly Δ's {RANK} directions" in finding(result.document)
    assert result.holds


@pytest.mark.parametrize(
    "settings, twice",
    [
        ({"precision": "fp16", "rounding": "once"}, False),
        ({"precision": "fp16", "rounding": "peft"}, True),
        ({"precision": "fp16", "rounding": "once", "base_precision": "fp16"}, True),
        ({"precision": "fp16", "rounding": "peft", "base_precision": "fp16"}, False),
        ({"precision": "bf16", "rounding": "once"}, False),
        ({"precision": "bf16", "rounding": "peft"}, True),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_the_size_of_the_noise_is_predicted_for_every_way_to_round(
    chain, settings, twice, no_figures
):
    """Once, or twice where the base was rounded in the merge or the subtraction, but not both."""
    result = chain(**settings).analyze()
    predicted = measured = 0.0
    for entry in result.document["parameters"].values():
        floors = entry["spectra"]["floors"]
        assert floors["base_rounded"] is twice
        assert floors["explained_share"] > 0.999
        predicted += entry["elements"] * floors["residual"]["rms"] ** 2
        measured += entry["residual_norm"] ** 2
    assert math.sqrt(measured / predicted) == pytest.approx(1, rel=0.04)


def test_updates_below_half_an_ulp_are_lost_and_predicted_as_lost(tiny, chain, no_figures):
    """A bf16 base and an update far below its ulps: the error is delta itself, not noise."""
    base = tiny.base("starcoder2", dtype=torch.bfloat16)
    adapter = tiny.adapter(base, scale=0.00003, r=1, lora_alpha=2)
    result = chain(base=base, adapter=adapter, precision="bf16").analyze()
    summary = result.document["summary"]
    assert 0.5 < summary["relative_error"] < 1.05
    ratio = summary["predictions"][0]
    assert ratio["name"] == "noise" and ratio["measured"]["median"] == pytest.approx(1, rel=0.1)
    assert summary["spectra"]["residual_nature"] == "lost"
    assert "lost whole" in finding(result.document)


def test_what_is_not_random_cannot_be_judged_without_the_base(
    tiny, starcoder2, lora, tmp_path, no_figures
):
    made = Chain(tmp_path, starcoder2, lora, precision="fp32")
    made.compare(tiny.adapter(starcoder2, scale=0.002, seed=9))
    (made.deltas.parent / script.STEP_3).unlink()
    document = made.analyze().document
    assert document["summary"]["spectra"]["residual_nature"] == "unknown"
    assert "takes the base to tell" in finding(document)


def test_another_adapters_task_vector_is_not_called_noise(tiny, starcoder2, lora, tmp_path):
    made = Chain(tmp_path, starcoder2, lora, precision="fp32")
    made.compare(tiny.adapter(starcoder2, scale=0.002, seed=9))
    result = made.analyze()
    summary = result.document["summary"]
    assert summary["spectra"]["residual_nature"] == "foreign"
    assert summary["spectra"]["smallest_similarity"] < 0.9
    assert "is not Δ plus rounding" in finding(result.document)
    assert result.holds  # identities are true of any two tensors


# The identities


def test_each_identity_is_stated_derived_and_measured(fp16):
    text = (fp16.output_dir / "mathematical_analysis.md").read_text(encoding="utf-8")
    for entry in fp16.document["identities"]:
        assert entry["holds"] and entry["checked"] == entry["held"] > 0
        assert f"### {entry['statement']}" in text
        assert 1 <= len(entry["derivation"]) <= 4
        for line in entry["derivation"]:
            assert line in text
        assert f"{entry['left']:.12g}" in text and f"{entry['right']:.12g}" in text


@pytest.mark.parametrize("identity", identities.IDENTITIES, ids=lambda identity: identity.name)
def test_a_wrong_side_is_noticed(identity):
    right = identities.Measured(0.5, 0.5, 1.0)
    wrong = identities.Measured(0.5, 0.5 - 1e-7, 1.0)
    assert identity.holds(right) and not identity.holds(wrong)
    assert identity.excess(wrong) > identity.excess(right)


def test_an_identity_that_fails_is_reported_and_is_the_exit_status(
    chain, monkeypatch, no_figures, capsys
):
    monkeypatch.setattr(identities.Identity, "holds", lambda self, measured: self.name != "weyl")
    made = chain(precision="fp32")
    assert run(made, "failing") == 1
    assert "❌ 9 of 10 identities hold" in capsys.readouterr().out
    assert "✗ holds for 0 of 8 parameters" in (
        made.folder / "failing" / "mathematical_analysis.md"
    ).read_text(encoding="utf-8")


# Bases that are there or not


def test_without_the_base_the_floor_is_measured(chain, copied, no_figures, capsys):
    """The deltas on their own: no comparison_results.json that names the base."""
    made = chain(precision="fp16")
    folder = copied(made.deltas.parent)
    (folder / script.STEP_3).unlink()
    result = script.analyze(folder / made.deltas.name, made.vector, folder / "out", device="cpu")
    summary = result.document["summary"]
    assert "The base is not at hand" in capsys.readouterr().err
    assert summary["precision"] == "fp16"  # as the task vector's file says
    assert summary["spectra"]["floor"] == "measured"
    assert summary["residual_in_ulps"] is None and summary["spectra"]["amplification"] is None
    assert summary["spectra"]["ranks_equal"] == 8
    assert summary["spectra"]["delta_rank"] == {"min": 4, "median": 4, "max": 4}
    assert "unknown without the base" in (folder / "out" / script.REPORT).read_text("utf-8")


def test_a_base_that_has_changed_since_is_not_used(chain, copied, starcoder2, no_figures, capsys):
    made = chain(precision="fp16")
    folder, other = copied(made.deltas.parent), copied(starcoder2)
    record = json.loads((folder / script.STEP_3).read_text())
    record["inputs"]["base"]["source"] = str(other)
    (folder / script.STEP_3).write_text(json.dumps(record))
    edit_tensors(other / "model.safetensors", lambda tensors: tensors.update(extra=torch.zeros(3)))
    result = script.analyze(folder / made.deltas.name, made.vector, folder / "out", device="cpu")
    assert "has changed since step 3" in capsys.readouterr().err
    assert result.document["inputs"]["base_model"] is None


def test_a_base_in_the_hubs_cache_is_found_without_a_network(chain, copied, starcoder2, hub):
    made = chain(precision="fp16")
    folder = copied(made.deltas.parent)
    record = json.loads((folder / script.STEP_3).read_text())
    hub_id = hub(starcoder2, "someone/tiny-starcoder2", "0" * 40)
    record["inputs"]["base"] |= {"source": hub_id, "revision": "0" * 40}
    with script._open_base(None, None, record) as base:
        assert base is not None and base.source == hub_id
    record["inputs"]["base"]["source"] = "someone/not-in-the-cache"
    with script._open_base(None, None, record) as base:
        assert base is None


@pytest.mark.parametrize(
    "record", [{}, {"inputs": []}, {"inputs": {"base": {"source": 7}}, "parameters": {"x": None}}]
)
def test_a_record_that_says_nothing_useful_is_passed_over(chain, copied, record, no_figures):
    made = chain(precision="fp32")
    folder = copied(made.deltas.parent)
    (folder / script.STEP_3).write_text(json.dumps(record))
    result = script.analyze(folder / made.deltas.name, made.vector, folder / "out", device="cpu")
    assert result.document["summary"]["adapter_rank"] is None
    assert result.document["summary"]["spectra"]["task_vector_rank"]["max"] == RANK


def test_a_base_that_is_named_must_fit(chain, llama):
    made = chain(precision="fp16")
    with pytest.raises(UserError, match=r"model\.layers"):
        made.analyze("misfit", base_model=str(llama))


# Other shapes of input


def test_a_delta_that_is_zero_has_no_direction(tiny, starcoder2, tmp_path):
    made = Chain(tmp_path, starcoder2, tiny.adapter(starcoder2, scale=0.0), precision="fp32")
    result = made.analyze()
    summary = result.document["summary"]
    assert summary["cosine_similarity"] is None and summary["snr_db"] is None
    assert summary["spectra"]["delta_rank"]["max"] == 0
    assert "subspace_similarity.png" not in names(result.output_dir)
    assert "zero everywhere" in finding(result.document) and result.holds


def test_vectors_have_statistics_but_no_spectrum(chain, copied, no_figures):
    made = chain(precision="fp16")
    folder = copied(made.deltas.parent)
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file({name: torch.full((32,), 1e-3)}, folder / made.deltas.name)
    result = script.analyze(folder / made.deltas.name, made.vector, folder / "out", device="cpu")
    entry = result.document["parameters"][name]
    assert entry["spectra"] is None and result.document["summary"]["spectra"] is None
    assert entry["delta_norm"] == pytest.approx(1e-3 * math.sqrt(32))
    assert result.document["modules"]["self_attn.q_proj.bias"]["parameters"] == 1
    assert finding(result.document).startswith("In fp16, T differs from Δ by")


def test_a_stack_of_matrices_is_one_tall_matrix_in_every_number(tmp_path, no_figures):
    """(experts, out, in) has experts * out rows: its degrees of freedom are those of that shape."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, RANK, generator=generator) for n in (3 * 40, 50))
    delta = left @ right.T
    noise = 1e-3 * torch.randn(delta.shape, generator=generator)
    for name, matrix in (("deltas", delta), ("vector", delta + noise)):
        save_file({"mlp.experts": matrix.view(3, 40, 50)}, tmp_path / f"{name}.safetensors")
    deltas, vector = (tmp_path / f"{name}.safetensors" for name in ("deltas", "vector"))
    document = script.analyze(deltas, vector, tmp_path / "out", device="cpu").document
    recovery = next(p for p in document["summary"]["predictions"] if p["name"] == "recovery")
    assert recovery["measured"]["median"] == pytest.approx(1, abs=0.1)


def test_another_architecture_with_its_own_names(tiny, chain, no_figures):
    base = tiny.base("gpt2")
    result = chain(base=base, adapter=tiny.adapter(base, scale=0.002), precision="fp16").analyze()
    assert set(result.document["modules"]) == {"c_attn", "c_proj", "c_fc"}
    assert result.document["summary"]["spectra"]["ranks_equal"] == 6


def test_labels_are_as_short_as_they_can_be():
    assert list(
        module_labels(
            [
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.7.self_attn.q_proj.weight",
                "h.0.attn.c_proj.weight",
                "h.0.mlp.c_proj.weight",
                "encoder.block.0.wi.weight",
                "decoder.block.0.wi.weight",
                "lm_head.weight",
                "h.0.attn.c_proj.bias",
            ]
        ).values()
    ) == [
        "q_proj",
        "q_proj",
        "attn.c_proj",
        "mlp.c_proj",
        "encoder.block wi",
        "decoder.block wi",
        "lm_head",
        "attn.c_proj.bias",
    ]


def test_the_same_input_gives_the_same_bytes(chain):
    made = chain(precision="fp16")
    first, second = made.analyze("first").output_dir, made.analyze("second").output_dir
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_json_is_strict(fp16):
    def refuse(constant):
        raise AssertionError(constant)

    text = (fp16.output_dir / script.RESULT).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(fp16.document))


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_figures_can_be_read_whatever_modules_are_called(fp16, tmp_path, monkeypatch, count):
    """Names of about 30 letters, in as many panels as there are, and in more."""
    monkeypatch.setattr(look.Page, "save", lambda page, path: page.figure)
    entries = list(fp16.document["parameters"].values())
    label, *_ = fp16.document["modules"]
    labels = [f"query_key_value_projection_{number}_of_it" for number in range(count)]
    document = {
        **fp16.document,
        "modules": {name: fp16.document["modules"][label] for name in labels},
        "parameters": {
            f"{number}": {**entries[number % len(entries)], "module": name}
            for number, name in enumerate(labels)
        },
    }
    for draw in (spectra.spectra, spectra.similarity, spectra.norms):
        figure = draw(document, tmp_path / "figure.png")
        assert_readable(figure)
        titles = [ax.get_title(loc="left") for ax in figure.axes]
        assert sum("query" in title and "of_it" in title for title in titles) >= min(count, 5)


def test_every_figure_has_its_caption_in_the_report(fp16):
    text = (fp16.output_dir / script.REPORT).read_text(encoding="utf-8")
    for file, caption in figures.CAPTIONS.items():
        assert f"]({file})" in text and f"*{file}*: {caption}" in text
        assert (fp16.output_dir / file).read_bytes().startswith(b"\x89PNG")


# Bad input


def test_nan_is_named(chain, copied):
    made = chain(precision="fp16")
    vector = copied(made.vector.parent) / made.vector.name
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(vector, lambda tensors: tensors[name].view(-1)[5].fill_(math.nan))
    with pytest.raises(UserError, match=rf"{name}: 1 values in rows 0 to 15 are NaN"):
        script.analyze(made.deltas, vector, vector.parent / "out", device="cpu")
    assert not (vector.parent / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.clear(), "holds no deltas"),
        (lambda t: t.update(other=torch.zeros(2, 2)), "has no other"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model\.norm\.weight: \(32,\) in .*, but \(7,\) in",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(chain, copied, change, message):
    made = chain(precision="fp16")
    deltas = copied(made.deltas.parent) / made.deltas.name
    edit_tensors(deltas, change)
    with pytest.raises(UserError, match=message):
        script.analyze(deltas, made.vector, deltas.parent / "out", device="cpu")


def run(made, name, *flags):
    files = ["--lora_file", str(made.deltas), "--task_vector_file", str(made.vector)]
    return script.main([*files, "--output_dir", str(made.folder / name), "--device=cpu", *flags])


def test_missing_files_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(["--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].endswith(
        "comparison_results/lora_deltas.safetensors: no such file; "
        "compare_lora_task_vector.py writes it"
    )


def test_a_revision_of_no_base_is_not_ignored(chain):
    with pytest.raises(UserError, match="--revision is the base's"):
        chain(precision="fp16").analyze(revision="main")


def test_an_input_is_never_overwritten(chain):
    made = chain(precision="fp16")
    with pytest.raises(UserError, match="is, holds or lies inside"):
        script.analyze(made.deltas, made.vector, made.deltas.parent, device="cpu")
    assert made.deltas.is_file()


# The command line


def test_with_no_arguments_it_reads_what_steps_2_and_3_wrote(
    chain, tmp_path, monkeypatch, no_figures, capsys
):
    made = chain(precision="fp32")
    (tmp_path / "comparison_results").symlink_to(made.deltas.parent)
    (tmp_path / "task_vectors_fp32").symlink_to(made.vector.parent)
    monkeypatch.chdir(tmp_path)
    assert script.main(["--quiet"]) == 0
    out = capsys.readouterr().out
    assert "✅ 10 of 10 identities hold for all 8 parameters" in out
    assert "📊 In fp32, T is Δ plus rounding noise" in out
    assert out.endswith("📁 Analysis saved to: mathematical_analysis/\n")
    assert (tmp_path / "mathematical_analysis" / script.RESULT).is_file()


def test_the_table_has_a_line_per_module_and_verbose_one_per_parameter(chain, no_figures, capsys):
    made = chain(precision="fp16")
    assert run(made, "brief") == 0
    brief = capsys.readouterr().out
    assert run(made, "long", "--verbose") == 0
    verbose = capsys.readouterr().out
    for module in ("q_proj", "k_proj", "v_proj", "o_proj", "all"):
        assert sum(line.split()[:1] == [module] for line in brief.splitlines()) == 1
    assert "model.layers.0" not in brief
    assert sum("model.layers." in line for line in verbose.splitlines()) == 8


def test_a_file_of_settings_sets_the_flags(chain, tmp_path, no_figures, capsys):
    made = chain(precision="fp16")
    settings = tmp_path / "settings.yml"
    settings.write_text(
        f"lora_file: {made.deltas}\ntask_vector_file: {made.vector.parent}\n"
        f"output_dir: {tmp_path / 'analysis'}\ndevice: cpu\nverbose: true\n"
    )
    assert script.main(["--config", str(settings)]) == 0
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out
    assert (tmp_path / "analysis" / script.REPORT).is_file()


def test_help_needs_no_torch():
    code = (
        "import sys, analyze_lora_vs_task_vector_math as s; s.build_parser().format_help();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'numpy')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
