"""The command line that every script shares: help, flags, YAML values, streams and exit status."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import extract_task_vectors
import merge_lora
from taskvec import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# Each takes a good part of a second to import, and --help needs none of them.
HEAVY = ("torch", "transformers", "peft", "matplotlib", "numpy", "huggingface_hub", "accelerate")
SHOW_HEAVY = f"""
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
    sys.exit(stop.code)
"""


def python(*words, **options):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, **options
    )


# -- help ----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy_and_shows_an_example(script):
    done = python("-c", SHOW_HEAVY, script, "--help")
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    assert f"python {script}" in done.stdout  # the docstring's example
    assert "--config" in done.stdout and "--quiet" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_in_under_half_a_second(script):
    fastest = float("inf")
    for _ in range(3):  # other processes may hold the processor; the best of three is the script's
        begin = time.perf_counter()
        assert python(script, "--help").returncode == 0
        fastest = min(fastest, time.perf_counter() - begin)
        if fastest < 0.5:
            return
    pytest.fail(f"{fastest:.2f} s")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_that_does_not_exist_is_one_line_and_status_2(script):
    done = python(script, "--colour", "red")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: unrecognized arguments: --colour red")
    assert done.stderr.count("\n") == 1


def test_flags_are_not_guessed_from_their_beginnings(capsys):
    assert merge_lora.main(["--precis", "fp16"]) == 2
    assert "unrecognized arguments: --precis" in capsys.readouterr().err


CONTRACT = {
    merge_lora: {
        "base_model": "bigcode/starcoder2-3b",
        "lora_path": "checkpoint-40000/",
        "output_dir": "merged_model",
        "precision": "fp32",
        "rounding": "once",
        "adapter_name": None,
        "device": "auto",
        "max_shard_size": None,
        "config": None,
        "revision": None,
        "quiet": False,
    },
    extract_task_vectors: {
        "base_model": "bigcode/starcoder2-3b",
        "finetuned_model": "merged_model_fp32/",
        "output_dir": "task_vectors/",
        "device": "auto",
        "trust_remote_code": False,
        "base_precision": "stored",
        "config": None,
        "revision": None,
        "quiet": False,
    },
}


@pytest.mark.parametrize("script", CONTRACT, ids=lambda script: script.__name__)
def test_flags_and_defaults_are_those_documented(script):
    assert vars(script.build_parser().parse_args([])) == CONTRACT[script]


# -- --config ------------------------------------------------------------------


@pytest.fixture
def merge_args(tmp_path):
    """The flags of merge_lora.py after a YAML text and a command line."""

    def parse(text, *flags):
        (tmp_path / "c.yml").write_text(text, encoding="utf-8")
        parser = merge_lora.build_parser()
        return cli.parse_args(parser, ["--config", str(tmp_path / "c.yml"), *flags])

    return parse


def extract_args(tmp_path, text, *flags):
    (tmp_path / "c.yml").write_text(text, encoding="utf-8")
    parser = extract_task_vectors.build_parser()
    return cli.parse_args(parser, ["--config", str(tmp_path / "c.yml"), *flags])


def test_yaml_values_apply(merge_args):
    args = merge_args(
        "base_model: some/base\nprecision: bf16\nmax_shard_size: 500MB\nquiet: true\n"
    )
    assert (args.base_model, args.precision, args.max_shard_size) == ("some/base", "bf16", "500MB")
    assert args.quiet is True
    assert args.lora_path == "checkpoint-40000/"  # what the file leaves out keeps its default


def test_a_flag_on_the_command_line_wins(merge_args):
    text = "precision: bf16\noutput_dir: a\n"
    args = merge_args(text, "--precision", "fp16")
    assert (args.precision, args.output_dir) == ("fp16", "a")
    assert merge_args(text, "--precision=fp32").precision == "fp32"  # even at its own default


def test_a_number_may_stand_for_a_text_and_null_for_the_default(merge_args):
    args = merge_args("max_shard_size: 1000\noutput_dir: 2024\nrevision:\n")
    assert (args.max_shard_size, args.output_dir, args.revision) == ("1000", "2024", None)


def test_a_value_that_looks_like_a_flag_is_a_value(merge_args):
    assert merge_args("output_dir: --precision\n").output_dir == "--precision"


def test_an_empty_file_changes_nothing(merge_args):
    assert merge_args("# nothing\n").precision == "fp32"


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("null", False)])
def test_switches_are_booleans(tmp_path, value, expected):
    args = extract_args(tmp_path, f"trust_remote_code: {value}\n")
    assert args.trust_remote_code is expected


def test_a_switch_with_a_negative_form_takes_both_booleans(tmp_path):
    import compare_lora_task_vector

    for value in (True, False):
        (tmp_path / "c.yml").write_text(f"generate_plots: {str(value).lower()}\ntolerance: 1e-3\n")
        parser = compare_lora_task_vector.build_parser()
        config = ["--config", str(tmp_path / "c.yml")]
        args = cli.parse_args(parser, config)
        assert (args.generate_plots, args.tolerance) == (value, 1e-3)
        assert cli.parse_args(parser, [*config, "--generate_plots"]).generate_plots is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bas_model: x\n", r"c\.yml: unknown key 'bas_model'; did you mean 'base_model'\?"),
        ("Precision: fp16\n", r"unknown key 'Precision'; did you mean 'precision'\?"),
        ("zzz: 1\n", "unknown key 'zzz'; did you mean '"),
        ("1: 2\n", "unknown key 1; did you mean '"),
        ("config: other.yml\n", "unknown key 'config'"),
        ("help: true\n", "unknown key 'help'"),
        ("precision: fp8\n", "precision: invalid choice: 'fp8'"),
        ("precision: true\n", "precision takes a single value, not True"),
        ("precision: [fp16]\n", r"precision takes a single value, not \['fp16'\]"),
        ("base_model: {a: 1}\n", "base_model takes a single value"),
        ("output_dir: 2024-01-01\n", "output_dir takes a single value, not datetime"),
        ("quiet: 1\n", "quiet is true or false, not 1"),
        ("quiet: 'yes'\n", "quiet is true or false, not 'yes'"),
        ("- base_model\n", "expected `flag: value` lines, found list"),
        ("just text\n", "expected `flag: value` lines, found str"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[a, b]: 1\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_yaml_mistake_is_named(merge_args, text, message):
    with pytest.raises(cli.UserError, match=message):
        merge_args(text)


def test_yaml_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "c.yml").write_bytes(b"base_model: \xff\xfe\n")
    parser = merge_lora.build_parser()
    with pytest.raises(cli.UserError, match=r"c\.yml: not valid YAML"):
        cli.parse_args(parser, ["--config", str(tmp_path / "c.yml")])


def test_a_missing_config_is_named(capsys, tmp_path):
    assert merge_lora.main(["--config", str(tmp_path / "no.yml")]) == 2
    assert "no.yml: no such file" in capsys.readouterr().err
    assert merge_lora.main(["--config", str(tmp_path)]) == 2
    assert f"Is a directory: {tmp_path}" in capsys.readouterr().err


def test_the_documented_config_is_one_that_the_script_takes():
    parser = extract_task_vectors.build_parser()
    args = cli.parse_args(parser, ["--config", str(ROOT / "extract_task_vectors_config.yml")])
    assert (args.base_model, args.finetuned_model) == (
        "bigcode/starcoder2-3b",
        "merged_model_fp32/",
    )
    assert (args.output_dir, args.device, args.trust_remote_code) == (
        "task_vectors_fp32/",
        "auto",
        False,
    )


# -- streams and exit status ---------------------------------------------------


def run(body, *flags):
    return cli.run(lambda: cli.new_parser("A script."), body, list(flags))


def talk(_):
    cli.notice("notice")
    cli.detail("detail")
    cli.result("result")
    return 1


def test_results_go_to_stdout_and_notices_to_stderr(capsys):
    assert run(talk) == 1
    assert capsys.readouterr() == ("detail\nresult\n", "notice\n")


def test_quiet_leaves_only_the_results(capsys):
    assert run(talk, "--quiet") == 1
    assert capsys.readouterr() == ("result\n", "")


def test_quiet_hushes_other_libraries_too(tmp_path):
    """matplotlib remarks that it cannot keep its fonts where there is no home to keep them in."""
    script = str(ROOT / "visualize_model_structure.py")
    command = [sys.executable, script, "--base_model", str(ROOT / "examples" / "starcoder2-mini")]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "MPL"))
    }
    environment |= {"HOME": str(tmp_path / "file" / "home")}
    (tmp_path / "file").touch()
    said = [
        subprocess.run(
            [*command, "--output_dir", "out", *more],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stderr
        for more in ([], ["--quiet"])
    ]  # fmt: skip
    assert "Matplotlib" in said[0] and said[1] == ""


def test_no_progress_bar_where_nobody_watches(capsys):
    def body(_):
        with cli.progress(10, "Working") as bar:
            bar.update(10)
        return 0

    assert run(body) == 0
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in range(3):
        with cli.progress(10, "Working") as bar:
            bar.update(10)
    assert threading.active_count() == before


def raising(error):
    def body(_):
        raise error

    return body


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    assert run(raising(cli.UserError("a\nlong\n  story"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(": error: a long story\n") and err.count("\n") == 1


def test_names_out_of_a_file_cannot_steer_the_terminal(capsys):
    assert run(raising(cli.UserError("größe\x1b[2J\x07 of ✅\u202e"))) == 2
    assert capsys.readouterr().err.endswith(": error: größe?[2J? of ✅?\n")


def test_a_failing_disk_is_one_line_that_names_the_file(capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/out")
    assert run(raising(error)) == 2
    assert capsys.readouterr().err.endswith(": error: No space left on device: /disk/out\n")
    assert run(raising(OSError("no number"))) == 2
    assert capsys.readouterr().err.endswith(": error: no number\n")


def test_an_interruption_is_status_130_without_a_traceback(capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted; nothing was left half-written\n"


def test_nor_is_one_while_the_flags_are_still_being_put_together(capsys):
    def build_parser():
        raise KeyboardInterrupt

    assert cli.run(build_parser, talk, []) == 130
    assert capsys.readouterr() == ("", "interrupted; nothing was left half-written\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_interrupted_as_soon_as_it_is_read(script, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for builder in ("new_parser", "new_command_parser"):
        monkeypatch.setattr(cli, builder, interrupted)
    assert importlib.import_module(script.removesuffix(".py")).main([]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was left half-written\n"


# Ctrl-C reaches it even where the tests themselves were started in a shell's background.
HEEDED = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("merge_lora.py", run_name="__main__")
"""
INTERRUPTED_TORCH = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 10)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("then", ["", "raise ImportError('numpy: loaded more than once')"])
def test_an_interruption_that_is_lost_while_torch_loads_ends_the_run(tmp_path, then):
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH + then)
    done = python("-c", HEEDED, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was left half-written\n"


def test_a_torch_that_cannot_be_loaded_is_no_interruption(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so')")
    done = python("merge_lora.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.endswith("ImportError: libtorch.so\n")


def test_a_defect_of_the_program_is_not_dressed_up_as_the_users_mistake():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


LEAVING = """
import sys
from taskvec import cli
def body(_):
    for _ in range(100_000):
        cli.result("line")
    return 0
sys.exit(cli.run(lambda: cli.new_parser("x"), body, []))
"""


def test_a_reader_that_leaves_is_no_traceback_and_no_verdict():
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141  # neither 0, 1 nor 2: nothing was said about the check


def test_a_terminal_without_emoji_gets_a_question_mark():
    code = "import sys; from taskvec import cli; body = lambda _: cli.result('✅ done') or 0; "
    code += "sys.exit(cli.run(lambda: cli.new_parser('x'), body, []))"
    done = python("-c", code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "? done\n", "")


# -- --device ------------------------------------------------------------------


def test_auto_is_the_cpu_with_a_notice_where_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == "No GPU visible to PyTorch: using the CPU.\n"


def test_auto_is_the_first_gpu_where_there_is_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.pick_device("auto") == torch.device("cuda:0")
    assert capsys.readouterr().err == ""


def test_a_gpu_is_taken_only_if_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.pick_device("cuda:1") == torch.device("cuda:1")
    assert cli.pick_device("cuda") == torch.device("cuda")
    with pytest.raises(cli.UserError, match=r"--device cuda:2: PyTorch sees 2 GPU\(s\)"):
        cli.pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:-1", "cuda:0 "])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(cli.UserError, match="not a device; use cpu, cuda:0 or auto"):
        cli.pick_device(name)


@pytest.mark.parametrize("name", ["meta", "xla", "mps"])
def test_devices_that_were_never_tried_are_refused(name):
    with pytest.raises(cli.UserError, match="only cpu and cuda devices are supported"):
        cli.pick_device(name)
