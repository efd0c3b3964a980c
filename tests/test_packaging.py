"""What pyproject.toml says of the package is what the folders and the imports say."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_INSTALLED = ("examples", "parity", "tests")
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "PIL": "pillow",
    "cuda": "cuda-python",
    "tensorrt_rtx": "tensorrt-rtx",
    "onnx_ir": "onnx-ir",
}
"""The name on the package index of a module that is not named like it."""
OF_THE_RUNTIME = ("bundle", "common", "engines", "families", "runtime", "serve", "cli", "__init__.py", "__main__.py")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")))


def modules() -> Iterator[Path]:
    """The modules of the package, below the root of the repository."""
    folders = [path.parent for path in REPOSITORY.glob("*/__init__.py") if path.parent.name not in NOT_INSTALLED]
    for path in (*REPOSITORY.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))):
        yield path.relative_to(REPOSITORY)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """How many points each import begins with, and the module."""
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def test_every_package_is_installed(project):
    due = {".".join(["diffoundry", *path.parent.parts]) for path in modules() if path.name == "__init__.py"}
    named = project["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(due) and len(set(named)) == len(named)


def test_every_module_is_of_a_package(project):
    named = set(project["tool"]["setuptools"]["packages"])
    assert not [path for path in modules() if ".".join(["diffoundry", *path.parent.parts]) not in named]


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}


def test_every_import_is_declared(project):
    """In the extra `export` what only it needs: what runs a bundle gets by with the rest."""
    extras = project["project"]["optional-dependencies"]
    base = distributions(project["project"]["dependencies"])
    slim = base | {
        name
        for extra in (
            *("bench", "build", "control", "lora", "openvino", "plot", "quality", "ray", "rtx"),
            *("serve", "tensorrt"),
        )
        for name in distributions(extras[extra])
    }
    undeclared = {}
    for path in modules():
        if path.name.endswith("_peer.py"):  # runs in an environment of its own
            continue
        for level, module in imports(path):
            top = module.split(".")[0]
            if level or top in sys.stdlib_module_names:
                continue
            known = slim if path.parts[0] in OF_THE_RUNTIME else slim | distributions(extras["export"])
            if DISTRIBUTIONS.get(top, top).lower().replace("_", "-") not in known:
                undeclared[str(path)] = module
    assert not undeclared


def test_nothing_imports_what_is_not_installed():
    for path in modules():
        found = [module for level, module in imports(path) if level and module.split(".")[0] in NOT_INSTALLED]
        assert not found, f"{path} imports {found}"


def test_the_extras_hold_each_other(project):
    """What compiles a checkpoint makes plans too; nothing that replaces a base dependency is an extra."""
    extras = project["project"]["optional-dependencies"]
    assert any(text.startswith("diffoundry[build]") for text in extras["export"])
    base = {name.split("-gpu")[0] for name in distributions(project["project"]["dependencies"])}
    for extra, requirements in extras.items():
        assert not {name for name in distributions(requirements) if name.removesuffix("-gpu") in base}, extra
