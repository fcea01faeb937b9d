"""Documentation is executed: examples in docstrings, code in Markdown, links, commands, generated pages."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted((SOURCE / "secateur").rglob("*.py"))
    if file.name != "__main__.py"
]
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

SHELLS = {"bash", "console", "sh"}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=options)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} failed (printed above)"


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file: the words after the fence, its text, its line."""

    words: tuple[str, ...]
    text: str
    line: int


def blocks(file: Path) -> list[Block]:
    """Every fenced block; a block indented under a list item loses the indentation."""
    found, text, fence, indent, words, start = [], [], "", 0, (), 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"( *)(`{3,})(.*)$", line)
        if not fence and mark and "`" not in mark[3]:
            indent, fence, words, text, start = len(mark[1]), mark[2], tuple(mark[3].split()), [], number
        elif fence and line.strip() == fence:
            found.append(Block(words, "\n".join(text) + "\n", start))
            fence = ""
        elif fence:
            text.append(line[indent:] if not line[:indent].strip() else line)
    assert not fence, f"{relative(file)}:{start}: a fence that is not closed"
    return found


def blocks_in(language: str, *wanted: str) -> list[Any]:
    """``(file, its blocks)`` of a language whose words are exactly ``wanted`` or more."""
    chosen = {f: [b for b in blocks(f) if b.words[:1] == (language,) and set(wanted) <= {*b.words}] for f in MARKDOWN}
    return [pytest.param(file, found, id=relative(file)) for file, found in chosen.items() if found]


@pytest.mark.parametrize(("file", "found"), blocks_in("python"))
def test_python_blocks_compile(file: Path, found: list[Block]) -> None:
    for block in found:
        compile("\n" * block.line + block.text, str(file), "exec", dont_inherit=True)


def execute(file: Path, found: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of one file in one namespace, in an empty folder."""
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        exec(compile("\n" * block.line + block.text, str(file), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize(("file", "found"), blocks_in("python", "runnable"))
def test_runnable_blocks(file: Path, found: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(file, [block for block in found if "model" not in block.words], tmp_path, monkeypatch)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("file", "found"), blocks_in("python", "runnable", "model"))
def test_runnable_blocks_with_the_demo_model(
    file: Path, found: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(file, found, tmp_path, monkeypatch)


def anchors(file: Path) -> set[str]:
    """The anchors that headings make, as code hosts derive them."""
    prose = re.sub(r"^( *)(`{3,})[^`]*\n.*?^\1\2 *$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", prose, flags=re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", MARKDOWN, ids=relative)
def test_local_links_exist(file: Path) -> None:
    prose = re.sub(r"^( *)(`{3,})[^`]*\n.*?^\1\2 *$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\[[^]]*\]\(([^)\s]+)[^)]*\)", prose):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (file.parent / path).resolve() if path else file
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken, f"{relative(file)} links to what is not there: {', '.join(broken)}"


def commands(text: str) -> list[list[str]]:
    """The ``secateur`` commands of a console block, continuation lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True) for line in prompted if line.startswith("secateur ")]


WITH_COMMANDS = [file for file in MARKDOWN if any(commands(b.text) for b in blocks(file) if {*b.words} & SHELLS)]


@pytest.mark.parametrize("file", WITH_COMMANDS, ids=relative)
def test_commands_exist(file: Path) -> None:
    typer_main = importlib.import_module("typer.main")
    known = typer_main.get_command(importlib.import_module("secateur.cli").app)
    for block in blocks(file):
        for words in commands(block.text) if {*block.words} & SHELLS else ():
            command, where = known, f"{relative(file)}:{block.line}: {' '.join(words)}"
            for word in words[1:]:
                if word in getattr(command, "commands", {}):
                    command = command.commands[word]
                elif hasattr(command, "commands") and not word.startswith("-"):
                    pytest.fail(f"{where}: no command '{word}'")
                elif word.startswith("--"):
                    options = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
                    assert word.partition("=")[0] in options, f"{where}: no option '{word}'"


def test_generated_pages_are_current() -> None:
    from secateur.methods import load, pages

    load()
    stale = pages.stale(ROOT / "docs")
    assert not stale, "; ".join(stale) + " (make docs)"
