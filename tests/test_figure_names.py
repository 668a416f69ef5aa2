"""Names out of files as texts of figures, wherever a script draws one."""

from __future__ import annotations

from unicodedata import category

import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.backends.backend_svg import RendererSVG

from tests.hostile import BASE, LORA, PREFIX, VECTOR, A, B, Sandbox, file_bytes, header_and_data

# A terminal's escape, what mathtext would take for a formula, and for a broken one, an order to
# write from right to left, and no end of letters.
NAME = "\x1b[31m$x_1$ $\\frac{\u202e\x07" + "n" * 500
NAMES = [f"model.layers.{layer}.{NAME}" for layer in (0, 1)]
OUTSIDE = f"{NAME}z"
BROKEN = f"one line\nand another{NAME}"  # no module that PEFT knows
# And whether its figures name tensors: those of the others name layers and what is in them.
SCRIPTS = {
    "compare_lora_task_vector": True,
    "visualize_model_structure": True,
    "investigate_parameter_changes": False,
    "quick_precision_test": False,
    "analyze_lora_vs_task_vector_math": True,
    "analyze_task_vector_structure": True,
    "find_intruder_dimensions": True,
    "final_validation": True,
    "analyze_task_vectors show": False,
}


@pytest.fixture
def sandbox(tmp_path):
    """Its model, adapter and task vector with names that were made to do harm."""
    sandbox = Sandbox(tmp_path / "home")
    modules = [*NAMES, OUTSIDE]
    tensors = {
        "base/model": {f"{name}.weight": BASE["a.weight"] for name in modules}
        | {BROKEN: BASE["b.weight"]},
        "lora/adapter_model": {f"{PREFIX}{name}.lora_A.weight": A for name in modules}
        | {f"{PREFIX}{name}.lora_B.weight": B for name in modules},
        "vector/task_vector": {f"{name}.weight": VECTOR["a.weight"] for name in modules}
        | {BROKEN: VECTOR["b.weight"]},
    }
    assert len(tensors["lora/adapter_model"]) == len(modules) * len(LORA)
    for file, content in tensors.items():
        sandbox.put(f"{file}.safetensors", file_bytes(*header_and_data(content)))
    return sandbox


@pytest.fixture
def drawn(monkeypatch):
    """Every text that a figure draws, tick labels and legends too; and whether as mathematics."""
    found = []
    for renderer in (RendererAgg, RendererSVG):
        plain = renderer.draw_text

        def record(self, gc, x, y, s, prop, angle, ismath=False, mtext=None, plain=plain):
            found.append((s, ismath))
            return plain(self, gc, x, y, s, prop, angle, ismath, mtext)

        monkeypatch.setattr(renderer, "draw_text", record)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_name_is_drawn_as_what_it_is_in_one_short_line(sandbox, drawn, script):
    more = ["--generate_plots"] if script == "compare_lora_task_vector" else []
    ending = sandbox.run(script, *more)
    assert ending.status in (0, 1), ending.err
    assert drawn
    for text, is_mathematics in drawn:
        assert not any(category(character)[0] == "C" for character in text), text
        assert len(text) < 200 and "n" * 61 not in text, text
        assert not is_mathematics or ("T" in text and "x_1" not in text), text
    assert any("?[31m$x" in text for text, _ in drawn) == SCRIPTS[script]
