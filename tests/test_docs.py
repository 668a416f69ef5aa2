"""The documents: every command runs as printed, every flag exists, every link leads somewhere.

A ```bash block is run, line by line, in a directory that looks like a fresh clone, unless the line
above the block says why not: <!-- not run: REASON -->. The flags of those are still checked.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("checkpoint-*/*.md"),
    ]
)
_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```bash\n(?P<body>.*?)```", re.S)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def commands(document: Path) -> Iterator[tuple[str, str | None]]:
    """(command, reason why it is not run or None) for every command line in bash blocks."""
    for block in _BLOCK.finditer(document.read_text(encoding="utf-8")):
        for line in block["body"].replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if command and not command.startswith("#"):
                yield command, block["reason"]


def runnable(document: Path) -> list[str]:
    return [command for command, reason in commands(document) if reason is None]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a fresh clone, to run commands in and litter."""
    directory = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in sorted({Path(path).parts[0] for path in tracked}):
        (directory / name).symlink_to(ROOT / name)
    return directory


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run(document: Path, clone: Path) -> None:
    """In the order of the document, each in the directory that the ones before it left behind."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in runnable(document):
        words = shlex.split(command)
        if words[0] in ("python", "python3", ".venv/bin/python"):
            words[0] = sys.executable
        done = subprocess.run(
            words, cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_exist(document: Path) -> None:
    """What is not run here (it needs the hub, a GPU or hours) at least parses."""
    for command, _ in commands(document):
        for part in re.split(r"\s*&&\s*", command):
            words = shlex.split(part)
            if "python" not in Path(words[0]).name or len(words) < 2:
                continue
            script = Path(words[1])
            if script.suffix != ".py" or script.parent != Path("."):
                continue
            module = importlib.import_module(script.stem)
            module.build_parser().parse_args(words[2:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in _LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name}: {target}"


def anchors(document: Path) -> list[str]:
    """What a link to each heading of a document is, in its order, as repositories show them."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^##+ (.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_and_between_documents_lead_to_headings(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
        found = anchors(document.parent / target if target else document)
        assert anchor in found, f"{document.name}: {target}#{anchor}"


def flags_of(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """The spellings of each flag of a script, and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)
        elif long := [option for option in action.option_strings if option.startswith("--")]:
            yield long


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("*.py")))
def test_every_flag_is_in_a_document(script: str) -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    documented = {*re.findall(r"--[a-z][\w-]*", text), "--help"}
    parser = importlib.import_module(script).build_parser()
    assert [flag for flag in flags_of(parser) if not documented & set(flag)] == []


def test_readme_lists_all_of_its_chapters_but_the_list() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    contents = text[text.index("**Contents:**") :].partition("\n\n")[0]
    chapters = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(re.findall(r"\(#", contents)) == len(chapters)


def test_the_tree_in_readme_is_the_tree() -> None:
    """Every top-level file and every module of taskvec is named in README's tree, and exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    shown = {
        name
        for name in tracked
        if "/" not in name or (name.startswith("taskvec/") and not name.endswith("__init__.py"))
    }
    missing = [name for name in shown if Path(name).name not in readme]
    assert not missing, missing
