"""The documentation is executed: commands and flags it names exist, its links lead somewhere, its Python runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]
PAGES = [*READMES, *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
DEMO = ROOT / "src/hasten/demo/model.safetensors"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page: str, program: str) -> list[list[str]]:
    """The arguments of every line of a shell block that calls `program`, comments dropped."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == [program]]


def parse(arguments: list[str]) -> object:
    from hasten.cli import main, options

    name, *rest = arguments
    module = main.load(name)
    return options.parse(module.Options, rest, prog=f"hasten {name}", description=module.HELP)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    for arguments in commands(page, "hasten"):
        parse(arguments)


@pytest.mark.parametrize("page", READMES)
def test_every_subcommand_is_shown(page: str) -> None:
    from hasten.cli import main

    assert {arguments[0] for arguments in commands(page, "hasten")} == set(main.commands())


@pytest.mark.parametrize("wrong", ["bench demo --promt 3", "benhc demo", "generate"])
def test_wrong_commands_are_seen(wrong: str) -> None:
    from hasten.errors import InputError

    with pytest.raises(InputError):
        parse(shlex.split(wrong))


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page: str) -> None:
    from hasten.cli import main

    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known = set()
    for name in main.commands():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            main.main([name, "--help"])
        known.update(re.findall(r"--[a-z][a-z-]+", shown.getvalue()))
    for script in set(re.findall(r"scripts/\w+\.py", text)):
        told = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        known.update(re.findall(r"--[a-z][a-z-]+", told.stdout))
    assert named - known == set()


@pytest.mark.parametrize("page", READMES)
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = {words[0] for words in commands(page, "make")}
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", READMES)
def test_the_tree_is_what_there_is(page: str) -> None:
    (tree,) = [b for b in blocks(page, "text") if b.startswith("native/")]
    above: list[str] = []
    shown = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0]]
        shown.add("".join(above[: depth + 1]))
    assert [path for path in shown if not (ROOT / path).exists()] == []
    packages = {f"src/hasten/{p.name}/" for p in (ROOT / "src/hasten").iterdir() if (p / "__init__.py").exists()}
    assert packages - shown == set()


@pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not in this tree")
@pytest.mark.parametrize("page", READMES)
def test_python_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for source in blocks(page, "python"):
        exec(compile(source, page, "exec"), {})
    assert capsys.readouterr().out.strip()
