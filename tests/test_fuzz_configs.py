"""Fuzzed JSON and YAML: configurations, results of earlier steps, manifests and --config files.

How many cases: `tests.hostile.cases`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from taskvec import cli
from taskvec.adapters import patterns
from tests import hostile
from tests.hostile import BASE, CONFIG, LORA_CONFIG, A, B, Sandbox, cases, json_bytes, run_main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        import taskvec.figures.architecture
        import taskvec.figures.mathematics
        import taskvec.figures.task_vector

        # The figures take half a second each, and see numbers only.
        patch.setattr(taskvec.figures.architecture, "model_structure", lambda *_: None)
        patch.setattr(taskvec.figures.mathematics, "draw", lambda *_: {})
        patch.setattr(taskvec.figures.task_vector, "change_norms", lambda *_: None)
        patch.setattr(patterns, "_SECONDS", 0.2)  # of patience; many cases use all of it
        yield Sandbox(tmp_path_factory.mktemp("fuzz") / "home")


# -- adapter_config.json -------------------------------------------------------

# Each takes time that is exponential, or a high power, of the length of what it does not match.
SLOW_PATTERNS = [
    *("(a+)+$", "(a|a)*b", "(.*)*x", "(.*.*.*)*b", "((a*)*)*b", "(a|.)*?(a|.)*?(a|.)*?b"),
    *(".*.*.*.*.*.*.*b", "(?:a?){40}a{40}", "(x+x+)+y", "([a-z.]+)*1"),
]
PATTERNS = st.one_of(
    hostile.TEXTS,
    st.sampled_from(
        [
            *("a", "^a$", "(", "[", "a{99999999999}", "(?i)a", "(?P<x>a)(?P<x>a)", "[[a]", "a**"),
            *("(" * 300 + ")" * 300, "(?:a{65535}){65535}", ")|(", "\\", "(?<=a+)b", "a|" * 3000),
            *SLOW_PATTERNS,
        ]
    ),
)
KEYS = {
    **LORA_CONFIG,
    "use_rslora": False,
    "rank_pattern": {"a": 2},
    "alpha_pattern": {"b": 3},
    "target_modules": ["a"],
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "init_lora_weights": True,
    "base_model_name_or_path": "x",
    "trainable_token_indices": None,
    "target_parameters": None,
}


@st.composite
def lora_configs(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["json", "json", "patterns", "numbers", "bytes", "nested"]))
    values = {**KEYS}
    if kind == "json":
        return json_bytes(draw(hostile.spoilt_json(KEYS)))
    if kind == "bytes":
        return draw(hostile.spoilt_bytes(json_bytes(KEYS)))
    if kind == "patterns":
        for key in draw(st.sets(st.sampled_from(["rank_pattern", "alpha_pattern"]), min_size=1)):
            values[key] = draw(st.dictionaries(PATTERNS, hostile.NUMBERS, min_size=1, max_size=3))
        key = draw(st.sampled_from(["target_modules", "exclude_modules", "layers_pattern", "bias"]))
        values[key] = draw(st.one_of(PATTERNS, st.lists(PATTERNS, max_size=2)))
        return json_bytes(values)
    if kind == "numbers":
        for key in ("r", "lora_alpha"):
            values[key] = draw(st.one_of(st.just(values[key]), hostile.SCALARS))
        values["use_rslora"] = draw(st.one_of(st.booleans(), hostile.VALUES))
        return json_bytes(values)
    text = json.dumps(values)
    deep = hostile.nested(draw(st.sampled_from([50, 400, 3000, 100_000])), "list")
    return text.replace(draw(st.sampled_from(['["a"]', '{"a": 2}', "null"])), deep).encode()


@cases(1200)
@given(
    content=lora_configs(),
    script=st.sampled_from(["merge_lora", "merge_lora", "debug_lora_structure"]),
)
def test_a_spoilt_adapter_config(sandbox, content, script):
    with sandbox.with_file("lora/adapter_config.json", content):
        ending = sandbox.run(script)
        if ending.status == 0 and script == "merge_lora":
            check_scaling(sandbox, json.loads(content))
    sandbox.clear()


def check_scaling(sandbox: Sandbox, config: dict[str, Any]) -> None:
    """The delta is scaled as PEFT scales it."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank: Any = ranks.get(get_pattern_key(list(ranks), "a"), config.get("r"))
    alpha: Any = alphas.get(get_pattern_key(list(alphas), "a"), config.get("lora_alpha"))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    merged = load_file(sandbox.out / "model.safetensors")["a.weight"].double().numpy()
    expected = BASE["a.weight"].astype(np.float64) + scaling * (B @ A).astype(np.float64)
    np.testing.assert_allclose(merged, expected, rtol=2e-6, atol=2e-6 * (1 + abs(scaling)))


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_a_pattern_that_takes_for_ever_is_stopped(sandbox, key, pattern):
    """The names of modules come from the same author as the pattern does."""
    header, data = hostile.header_and_data(hostile.LORA)
    module = "a" * 60 + "." + "x" * 60
    spoilt = {name.replace("model.a.", f"model.{module}."): e for name, e in header.items()}
    config = {**KEYS, key: {pattern: 2} if key.endswith("pattern") else pattern}
    file = hostile.file_bytes(spoilt, data)
    with sandbox.with_file("lora/adapter_model.safetensors", file):
        with sandbox.with_file("lora/adapter_config.json", json_bytes(config)):
            for script in ("merge_lora", "debug_lora_structure"):
                assert sandbox.run(script).status in (1, 2)
                sandbox.clear()


# -- config.json, manifests and results ----------------------------------------

MODEL_CONFIG = {
    **CONFIG,
    "torch_dtype": "float32",
    "model_type": "tiny",
    "text_config": {"dtype": "float32", "more": {"dtype": "float16"}},
    "quantization_config": None,
    "tie_word_embeddings": False,
}


@st.composite
def model_configs(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["json", "json", "bytes", "nested"]))
    if kind == "json":
        return json_bytes(draw(hostile.spoilt_json(MODEL_CONFIG)))
    if kind == "bytes":
        return draw(hostile.spoilt_bytes(json_bytes(MODEL_CONFIG)))
    depth = draw(st.sampled_from([20, 300, 900, 3000, 100_000]))
    inner = draw(st.sampled_from(["null", '{"a": 1}']))
    deep = '{"dtype": "float16", "a":' * depth + inner + "}" * depth
    return json.dumps(MODEL_CONFIG).replace('"tiny"', deep).encode()


@cases(500)
@given(
    content=model_configs(),
    script=st.sampled_from(["merge_lora", "extract_task_vectors", "visualize_model_structure"]),
)
def test_a_spoilt_config(sandbox, content, script):
    with sandbox.with_file("base/config.json", content):
        ending = sandbox.run(script)
        if ending.status == 0 and script == "merge_lora":
            written = json.loads((sandbox.out / "config.json").read_text("utf-8"))
            assert "float32" in (written.get("dtype"), written.get("torch_dtype"))
    sandbox.clear()


@pytest.fixture(scope="module")
def results(sandbox: Sandbox) -> Any:
    """What compare_lora_task_vector.py writes about the sandbox."""
    assert sandbox.run("compare_lora_task_vector").status == 0
    found = json.loads((sandbox.out / "comparison_results.json").read_text("utf-8"))
    sandbox.clear()
    return found


@cases(400)
@given(data=st.data())
def test_a_spoilt_result_of_an_earlier_step(sandbox, results, data):
    """--comparison of one script, and the record beside the deltas that another one finds."""
    content = json_bytes(data.draw(hostile.spoilt_json(results)))
    if data.draw(st.integers(0, 9)) == 0:
        with sandbox.with_file("vector/comparison_results.json", content):
            sandbox.run("analyze_lora_vs_task_vector_math")
    else:
        with sandbox.with_file("c.json", content):
            words = ["--comparison", str(sandbox.home / "c.json")]
            found = run_main(
                importlib.import_module("investigate_parameter_changes").main,
                [
                    *("--task_vector_path", str(sandbox.home / "vector"), *words),
                    *("--output_dir", str(sandbox.out), "--device", "cpu"),
                ],
            )
            if found.status == 0:
                text = (sandbox.out / "parameter_changes.json").read_text("utf-8")
                json.loads(text, parse_constant=pytest.fail)
    sandbox.clear()


@cases(300)
@given(
    content=hostile.spoilt_json({"files": ["merge_manifest.json", "mine.txt"]}).map(json_bytes),
)
def test_a_spoilt_manifest_in_the_output_directory(sandbox, content):
    """A directory is replaced only if all of it is known to be an earlier output."""
    sandbox.put("out/merge_manifest.json", content)
    sandbox.put("out/thesis.tex", b"years of work")
    found = run_main(importlib.import_module("merge_lora").main, sandbox.words("merge_lora"))
    if "thesis.tex" not in content.decode():
        assert found.status == 2
        assert (sandbox.out / "thesis.tex").read_bytes() == b"years of work"
        assert (sandbox.out / "merge_manifest.json").read_bytes() == content
    sandbox.clear()


# -- YAML ----------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
MERGE_BOMB = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}\n"
    for n in range(12)
)
YAML_VALUES = st.sampled_from(
    [
        *("1", "-1", "1e999", ".nan", "0x" + "f" * 5000, "9" * 5000, "1:" * 2000 + "1", "true"),
        *("null", "~", "[]", "{}", "[1, [2]]", "{a: b}", "2024-99-99", "2024-01-01", "'", '"'),
        *("!!binary x", "!!float x", "!!int x", "!!set {a}", "!!omap [a]", "!!pairs [a]", "!x y"),
        *("!!python/object/apply:os.system [x]", "!!timestamp x", "&a [*a]", "*a", "<<: 1", "? a"),
        *("|\n  text", ">\n  text", "\x00", "\ufeff", "\x85", "\ud800", "- a", "--- b", "%YAML 9"),
        *("[" * 5000, "{a: " * 5000, "- " * 5000, "bf16", "fp32", "'\\x1b'", '"\\x1b[31m"', "?"),
        *("!!bool maybe", "=", "! 1", "!<x> 1", "1_000", "0b2", "0o9", "190:20:30", "a\tb", "@"),
    ]
)


@st.composite
def yaml_texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """A script and a file for its --config."""
    script = draw(st.sampled_from(SCRIPTS))
    parser = importlib.import_module(script).build_parser()
    keys = [action.dest for action in parser._actions] + ["zzz", "<<", "1", "", "[a]", "x" * 500]
    kind = draw(st.sampled_from(["pairs", "pairs", "pairs", "bytes", "bomb", "text"]))
    if kind == "bomb":
        bomb = draw(st.sampled_from([BOMB, MERGE_BOMB, BOMB + "quiet: *m\n", "a: &a [*a, *a]\n"]))
        return script, bomb.replace("a:", f"{draw(st.sampled_from(keys))}:", 1).encode()
    if kind == "text":
        return script, draw(st.text(max_size=40)).encode("utf-8", "surrogatepass")
    pairs = draw(st.lists(st.tuples(st.sampled_from(keys), YAML_VALUES), max_size=3))
    content = "".join(f"{key}: {value}\n" for key, value in pairs).encode("utf-8", "surrogatepass")
    return script, draw(hostile.spoilt_bytes(content)) if kind == "bytes" else content


@cases(1000)
@given(case=yaml_texts())
def test_a_spoilt_yaml_file(sandbox, case):
    script, content = case
    with sandbox.with_file("c.yml", content):
        build_parser = importlib.import_module(script).build_parser
        flags = {action.dest for action in build_parser()._actions}

        def body(args):
            assert set(vars(args)) <= flags
            return 0

        words = ["--config", str(sandbox.home / "c.yml")]
        assert run_main(lambda words: cli.run(build_parser, body, words), words).status in (0, 2)
