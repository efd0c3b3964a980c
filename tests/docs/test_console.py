"""Every command and script in the documentation is run, and shows what the page says; names and links lead somewhere.

A fence says how: ```console and ```python are run in the order of the page, `slow` with the slow tests, `norun` not at
all (a hub id, a GPU, an installation). Lines that begin with `$ ` are run by bash; what stands below is the output, in
which `...` is anything.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from diffoundry.cli import cli
from diffoundry.tests.conftest import REPOSITORY

_FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(REPOSITORY / name for name in _FRONT), *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(REPOSITORY)) for path in PAGES]
_BLOCK = re.compile(r"^```(\S+)?(?: (\w+))?\n(.*?)^```$", re.M | re.S)
_OF_OTHERS = {"--sheet"}
"""Options of the programs in `examples/`, by their names."""
# `diffoundry` is the package under test, whatever is installed beside it
_BASH = 'diffoundry() { python -m diffoundry "$@"; }\n'


@dataclass(frozen=True)
class Block:
    kind: str
    how: str
    text: str

    def commands(self) -> list[tuple[str, str]]:
        """The commands of a console block, and what each shows."""
        found: list[tuple[str, str]] = []
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines(keepends=True):
            if line.startswith("$ "):
                found.append((line[2:].strip(), ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line)
        return found


def blocks(page: Path, kind: str) -> list[Block]:
    found = [Block(*(part or "" for part in match.groups())) for match in _BLOCK.finditer(page.read_text("utf-8"))]
    return [block for block in found if block.kind == kind]


def with_slow(kind: str) -> list[object]:
    """The pages that have such blocks: their fast ones, and all of those that have slow ones."""
    cases: list[object] = []
    for page, name in zip(PAGES, NAMES, strict=True):
        ways = {block.how for block in blocks(page, kind)}
        cases += [pytest.param(page, False, id=name)] if "" in ways else []
        cases += [pytest.param(page, True, id=f"{name}-slow", marks=pytest.mark.slow)] if "slow" in ways else []
    return cases


@pytest.fixture
def work(tmp_path, bundle_of):
    """A folder as after `make demo`: the examples, and a bundle of pico that may be changed."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    shutil.copytree(bundle_of("pico"), tmp_path / "build" / "pico.bundle")
    return tmp_path


def run(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        cwd=work,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def shows(expected: str, output: str) -> bool:
    """A line of `...` stands for any lines, within a line it stands for anything."""
    lines = expected.splitlines(keepends=True)
    every = ["(?:.*\n)*" if line == "...\n" else re.escape(line).replace(re.escape("..."), ".*") for line in lines]
    return re.fullmatch("".join(every), output) is not None


@pytest.mark.parametrize(("page", "slow"), with_slow("console"))
def test_commands_show_what_the_page_says(page, slow, work):
    for block in blocks(page, "console"):
        if block.how == "norun" or (block.how == "slow" and not slow):
            continue
        for command, expected in block.commands():
            done = run(["bash", "-c", _BASH + command], work)
            assert (done.returncode == 0) != ("Error: " in expected), f"$ {command}\n{done.stdout}"
            assert shows(expected, done.stdout), f"$ {command}\n{done.stdout}"


@pytest.mark.parametrize(("page", "slow"), with_slow("python"))
def test_scripts_run(page, slow, work):
    """The blocks of a page are one script."""
    wanted = ("", "slow") if slow else ("",)
    script = "".join(block.text for block in blocks(page, "python") if block.how in wanted)
    done = run([sys.executable, "-c", script], work)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_fences_are_known(page):
    found = {(match[1] or "", match[2] or "") for match in _BLOCK.finditer(page.read_text("utf-8"))}
    assert found <= {(kind, how) for kind in ("console", "python") for how in ("", "slow", "norun")} | {
        ("", ""),
        ("sh", ""),
        ("json", ""),
        ("yaml", ""),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_options_and_modules_are_there(page):
    """Of commands that are run and those that are not, and of those in the text."""
    text = page.read_text("utf-8")
    lines = [command for block in blocks(page, "console") for command, _ in block.commands()]
    lines += [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    lines += re.findall(r"`((?:diffoundry|python) [^`\n]+)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            assert words[2] == "pip" or importlib.util.find_spec(words[2]), line
        if words[:1] == ["diffoundry"]:
            assert unknown(words[1:]) == [], line
    every = {option for verb in cli.commands.values() for option in options(verb)} | _OF_OTHERS
    named = {re.match(r"--?[\w-]+", option)[0] for option in re.findall(r"`(--?[a-z][^`\n]*)`", text)}
    assert named - every == set()


def options(verb: click.Command) -> set[str]:
    return {name for param in verb.params for name in param.opts} | {"-h", "--help"}


def unknown(words: list[str]) -> list[str]:
    """The verb, or those options of `diffoundry WORDS`, that the command line does not have."""
    if words[0] in ("--version", "--help", "VERB"):
        return []
    if words[0] not in cli.commands:
        return [words[0]]
    words = words[: words.index("--")] if "--" in words else words
    given = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [word for word in given if word not in options(cli.commands[words[0]])]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        heads = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.M) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in anchors


def test_headings_of_troubleshooting_are_messages():
    """Each is a part of a text in the code, in which `...` is a value."""
    rooms = ("bundle", "calibration", "cli", "common", "engines", "export", "families", "runtime", "serve")
    trees = [ast.parse(path.read_text("utf-8")) for room in rooms for path in (REPOSITORY / room).rglob("*.py")]
    texts = "\n".join(text for tree in trees for node in ast.walk(tree) if (text := template(node)) is not None)
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = re.findall("^## (.*)$", page, re.M)
    assert len(headings) > 20
    for heading in headings:
        assert re.search(re.escape(heading).replace(re.escape("..."), ".*"), texts), heading


def template(node: ast.AST) -> str | None:
    """A text of the code, with `...` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("\n", " ")
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "..." for part in node.values)
    return None


def test_the_check_can_fail():
    assert not shows("a...\nb ... c\n", "a\nmuch\nmore\nb 17 c\n")
    assert shows("a\n...\nb ... c\n", "a\nmuch\nmore\nb 17 c\n")
    assert not shows("a\n", "b\n")
    assert unknown(["run", "x", "--stepz", "3"]) == ["--stepz"]
    assert unknown(["runn"]) == ["runn"]
