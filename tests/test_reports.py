"""The words of the text reports: what a reader is told of a merge that does not hold."""

import pytest

import compare_lora_task_vector
import final_validation
from taskvec.architecture import natural_key
from taskvec.wording import are
from tests.lab import Lab


def test_names_are_sorted_with_their_numbers_in_order():
    names = ["h.10.w", "h.2.w", "b", "h.2.b"]
    assert sorted(names, key=natural_key) == ["b", "h.2.b", "h.2.w", "h.10.w"]


@pytest.mark.parametrize(
    ("count", "words"), [(1, "1 element is"), (2, "2 elements are"), (12345, "12,345 elements are")]
)
def test_the_verb_has_its_nouns_number(count, words):
    assert are(count, "element") == words


def failing(tiny, tmp_path, value):
    """A lab, and a model of it that has one wrong element."""
    lab = Lab(tmp_path, tiny)
    tensors = lab.merged()
    tensors[lab.names[0]][3, 5] = value
    return lab, lab.write(tensors)


def test_a_report_says_how_far_beyond_its_bound_the_worst_element_is(tiny, tmp_path):
    lab, model = failing(tiny, tmp_path, 7.0)
    compare_lora_task_vector.compare(
        str(lab.base),
        str(lab.lora),
        tmp_path / "out",
        finetuned_model=str(model),
        device="cpu",
        generate_plots=False,
    )
    report = (tmp_path / "out" / "detailed_comparison_report.txt").read_text()
    assert f"Farthest beyond its bound: {lab.names[0]}[3, 5]" in report
    assert "Nearest to its bound" not in report
    assert "task vector on disk                           none was read" in report


def test_what_fails_is_not_said_to_keep_a_share_of_the_update(tiny, tmp_path, capsys):
    lab, model = failing(tiny, tmp_path, float("nan"))
    status = final_validation.main(
        [
            *("--base_model", str(lab.base), "--lora_path", str(lab.lora), "--device", "cpu"),
            *("--finetuned_model", str(model), "--output_dir", str(tmp_path / "out")),
            "--no-behaviour",
        ]
    )
    output = capsys.readouterr().out
    assert status == 1
    (row,) = [line for line in output.splitlines() if line.startswith("fp32 ")]
    assert row.split()[-3:] == ["-", "-", "violated"]
    assert f"1 element of {lab.names[0]} is NaN or infinite" in output
    report = (tmp_path / "out" / "validation_report.txt").read_text()
    assert "GIVEN, FP32" in report
    assert "adapted weights in fp32" in report  # a figure's title
    assert "1 element is NaN or infinite." in report
