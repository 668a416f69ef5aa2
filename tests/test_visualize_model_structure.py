"""What visualize_model_structure.py says of a checkpoint, and that its figure can be read."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import visualize_model_structure
from taskvec.figures.architecture import MOST_ROWS, model_structure, title
from taskvec.tensorfile import TensorFileWriter
from visualize_model_structure import describe

OUTPUT = {"model_structure.json", "model_structure.png", "model_structure.svg"}
ROOT = Path(__file__).parent.parent
REAL_ADAPTER = ROOT / "checkpoint-40000"


def headers_only(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A checkpoint of zeros."""
    with TensorFileWriter(path, [(name, torch.float32, shape) for name, shape in shapes.items()]):
        pass
    return path


def mixture_of_experts(path: Path, layers: int = 2, experts: int = 4) -> Path:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
        for expert in range(experts):
            shapes[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"] = (6, 8)
    return headers_only(path, shapes)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def write_shapes(directory: Path) -> None:
    """Run the example's script, which is no part of a package."""
    script = runpy.run_path(str(ROOT / "examples" / "make_starcoder2_3b_shapes.py"))
    shapes = script["write_shapes"](directory)
    assert len(shapes) == 483


@pytest.fixture(scope="session")
def starcoder2_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """StarCoder2-3B's real names and shapes, without its 12 GB."""
    directory = tmp_path_factory.mktemp("starcoder2") / "starcoder2-3b"
    write_shapes(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "formula"),
    [
        ("llama", "2 layers x 9 parameters + 3 global = 21"),
        ("mistral", "2 layers x 9 parameters + 3 global = 21"),
        ("qwen2", "2 layers x 12 parameters + 3 global = 27"),
        ("gpt2", "2 layers x 12 parameters + 4 global = 28"),
        ("starcoder2", "2 layers x 16 parameters + 3 global = 35"),
    ],
)
def test_the_count_of_parameters_is_broken_down(family, formula, tiny):
    base = tiny.base(family)
    document = describe(str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = {name: list(value.shape) for name, value in model.named_parameters()}
    assert document["formula"] == formula
    found = {name: entry["shape"] for name, entry in document["parameters"].items()}
    assert found == expected
    assert document["totals"]["elements"] == model.num_parameters()


def test_encoder_and_decoder_are_two_stacks(t5):
    document = describe(str(t5))
    assert document["formula"] == (
        "decoder.block (1 x 14 + 2 x 13) + encoder.block (1 x 9 + 2 x 8) + 3 global = 68"
    )
    assert document["totals"]["tensors"] == 68
    assert {stack["name"] for stack in document["stacks"]} == {"decoder.block", "encoder.block"}
    encoder = next(stack for stack in document["stacks"] if stack["name"] == "encoder.block")
    bias = next(row for row in encoder["rows"] if "relative_attention_bias" in row["name"])
    assert bias["layers"] == [0]


@pytest.mark.parametrize(
    ("shapes", "formula"),
    [
        ({"fc1.weight": (4, 3), "fc1.bias": (4,), "scale": ()}, "3 parameters, no layers"),
        ({"weight": (4, 3)}, "1 parameter, no layers"),
        ({"0.weight": (4, 3), "2.weight": (2, 4)}, "2 layers x 1 parameter = 2"),
        ({"h.0.w": (1,), "h.0.b": (1,), "h.1.w": (1,)}, "h (1 x 2 + 1 x 1) = 3"),
    ],
)
def test_models_that_are_no_transformers(shapes, formula, tmp_path, capsys):
    path = headers_only(tmp_path / "model.safetensors", shapes)
    flags = ["--base_model", str(path), "--output_dir", str(tmp_path / "out")]
    assert visualize_model_structure.main(flags) == 0
    assert f"   {formula}\n" in capsys.readouterr().out


def test_experts_are_one_row(tmp_path):
    base = mixture_of_experts(tmp_path / "model.safetensors", layers=3, experts=8)
    document = describe(str(base))
    assert document["formula"] == "3 layers x 9 parameters + 1 global = 28"
    rows = {row["name"]: row for row in document["stacks"][0]["rows"]}
    experts = rows["mlp.experts.0-7.up_proj.weight"]
    assert (experts["tensors"], experts["elements"], experts["block"]) == (24, 24 * 48, "mlp")


def test_what_the_adapter_changes(tiny):
    """Its targets are q and v of both layers and down_proj: 6 weights."""
    base = tiny.base("llama")
    adapter = tiny.adapter(base)
    document = describe(str(base), lora_path=str(adapter))
    touched = {name for name, entry in document["parameters"].items() if entry["touched"]}
    assert touched == {
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    elements = 2 * (32 * 32 + 16 * 32 + 32 * 48)
    assert document["totals"]["touched_elements"] == elements
    stored = sum(t.numel() for t in load_file(adapter / "adapter_model.safetensors").values())
    assert document["adapter"]["stored_elements"] == stored
    rows = {row["name"]: row for row in document["stacks"][0]["rows"]}
    assert rows["self_attn.q_proj.weight"]["touched_layers"] == [0, 1]
    assert rows["self_attn.k_proj.weight"]["touched_layers"] == []


def test_experts_that_are_changed_in_part(tmp_path):
    base = mixture_of_experts(tmp_path / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    factors = {
        f"{module}.lora_A.weight": torch.ones(1, 8),
        f"{module}.lora_B.weight": torch.ones(6, 1),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    document = describe(str(base), lora_path=str(adapter))
    row = next(row for row in document["stacks"][0]["rows"] if "experts" in row["name"])
    assert (row["touched_layers"], row["partly_touched_layers"]) == ([], [1])
    drawn = texts(model_structure(document, []))
    assert "some of the cell's tensors changed" in drawn


def test_starcoder2_3b(starcoder2_3b, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--base_model", str(starcoder2_3b), "--lora_path", str(REAL_ADAPTER)]
    assert visualize_model_structure.main([*flags, "--output_dir", str(output)]) == 0
    text = capsys.readouterr().out
    assert "30 layers x 16 parameters + 3 global = 483\n" in text
    assert "483 tensors (483 float32), 3,030,371,328 elements, 12.12 GB\n" in text
    assert "120 of 483 tensors (24.84 %) and 613,416,960 elements (20.24 %)\n" in text
    assert "It stores 4,546,560 parameters (0.15 %), 18.19 MB\n" in text
    document = json.loads((output / "model_structure.json").read_text())
    assert document["adapter"]["stored_share"] == pytest.approx(0.00150, abs=5e-6)
    assert {name: entry["tensors"] for name, entry in document["blocks"].items()} == {
        "embedding": 1,
        "attention": 240,
        "mlp": 120,
        "norm": 122,
    }
    assert title(document) == (
        "The adapter changes 120 of 483 tensors (24.84 %, all attention): 20.24 % of the elements, "
        "for 0.15 % stored"
    )


def test_no_tensor_is_read(llama, llama_lora, monkeypatch):
    from taskvec.tensorfile import TensorFile

    def read(*_: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(TensorFile, "read", read)
    describe(str(llama), lora_path=str(llama_lora))


def test_files_and_their_formats(llama, llama_lora, tmp_path):
    for output in (tmp_path / "one", tmp_path / "two"):
        visualize_model_structure.visualize(str(llama), output, lora_path=str(llama_lora))
        assert {path.name for path in output.iterdir()} == OUTPUT
    with Image.open(tmp_path / "one" / "model_structure.png") as image:
        assert image.format == "PNG" and image.width == 1500
    tree = ElementTree.parse(tmp_path / "one" / "model_structure.svg")
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for name in OUTPUT:  # the same checkpoint, the same bytes
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_sharded_bases_and_single_files_are_the_same_model(tiny, llama, tmp_path):
    whole = describe(str(llama))
    sharded = tiny.base("llama", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(llama / "model.safetensors", bare)
    for other in (sharded, bare):
        document = describe(str(other))
        assert document["formula"] == whole["formula"]
        assert document["parameters"] == whole["parameters"]


def test_an_adapter_of_another_model_is_refused(tiny, capsys, tmp_path):
    base, other = tiny.base("llama"), tiny.base("gpt2")
    flags = ["--base_model", str(base), "--lora_path", str(tiny.adapter(other))]
    assert visualize_model_structure.main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "which" in error and "has not got" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_document_shows_what_the_commands_print(tmp_path, monkeypatch, capsys):
    """STARCODER2_ARCHITECTURE_ANALYSIS.md, where its commands are about the real shapes."""
    document = (ROOT / "STARCODER2_ARCHITECTURE_ANALYSIS.md").read_text(encoding="utf-8")
    write_shapes(tmp_path / "starcoder2-3b-shapes")
    (tmp_path / "checkpoint-40000").symlink_to(REAL_ADAPTER)
    monkeypatch.chdir(tmp_path)
    pairs = re.findall(
        r"```bash\npython (\w+)\.py ([^\n]*)\n```\n\n```text\n(.*?)```", document, re.S
    )
    shown = [(script, flags, text) for script, flags, text in pairs if "-shapes -" in flags]
    assert {script for script, _, _ in shown} == {
        "visualize_model_structure",
        "debug_lora_structure",
    }
    for script, flags, text in shown:
        capsys.readouterr()
        assert importlib.import_module(script).main(shlex.split(flags)) == 0
        assert capsys.readouterr().out == text


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_readable(figure: Figure) -> None:
    """No text overlaps another one or leaves the page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    shown = [
        (text, text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible()
    ]
    for text, box in shown:
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text.get_text()
        assert page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
    for (first, one), (second, two) in itertools.combinations(shown, 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width <= 1 or height <= 1, (first.get_text(), second.get_text())


@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_the_figure_of_a_family_can_be_read(family, tiny):
    base = tiny.base(family)
    document = describe(str(base), lora_path=str(tiny.adapter(base)))
    assert_readable(model_structure(document, []))


def test_the_figure_of_an_encoder_decoder_can_be_read(t5):
    document = describe(str(t5))
    assert_readable(model_structure(document, []))


def test_the_figure_of_starcoder2_3b_can_be_read(starcoder2_3b):
    document = describe(str(starcoder2_3b), lora_path=str(REAL_ADAPTER))
    figure = model_structure(document, [])
    assert_readable(figure)
    drawn = texts(figure)
    assert "model.layers: 30 x 16" in drawn
    assert "changed by the adapter (120 tensors)" in drawn
    assert "not changed (363 tensors)" in drawn


@pytest.mark.parametrize("layers", [1, 48, 49, 126])
def test_many_layers_are_folded_into_runs_of_equal_ones(layers, tmp_path):
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (8, 4) for layer in range(layers)}
    document = describe(str(headers_only(tmp_path / "m.safetensors", shapes)))
    figure = model_structure(document, [])
    assert_readable(figure)
    assert (f"0-{layers - 1}" in texts(figure)) == (layers > 48)


def test_names_of_any_kind_are_drawn(tmp_path):
    """No name is taken for mathematics, and a long one is cut."""
    shapes: dict[str, tuple[int, ...]] = {
        "a$b$.weight_$x": (4, 2),
        "x.$\\frac.0.w": (0, 3),
        f"{'y' * 200}.1.w": (),
        "2": (1,) * 9,
    }
    document = describe(str(headers_only(tmp_path / "m.safetensors", shapes)))
    assert_readable(model_structure(document, []))


def test_what_does_not_fit_on_a_page_is_counted(tmp_path):
    shapes = {f"tensor_{number}": (3,) for number in range(MOST_ROWS + 25)}
    document = describe(str(headers_only(tmp_path / "m.safetensors", shapes)))
    drawn = texts(model_structure(document, []))
    assert "… and 25 more tensors with 75 elements: see the JSON" in drawn
