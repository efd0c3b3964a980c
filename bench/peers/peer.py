"""The peers there are: what each is called, which script runs it, and where its environment lies."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import BenchError
from ...common.files import sha256_json, user_cache

HERE = Path(__file__).resolve().parent
WHOLE = "whole.json"
"""In an environment that was made to the end."""


@dataclass(frozen=True, slots=True)
class Peer:
    """title: in tables. script: its file and options. environment: the name of its requirements.

    precisions: that it runs in. checkpoint: whether it reads the diffusers folder, and not the bundle.
    """

    title: str
    script: tuple[str, ...]
    environment: str
    precisions: tuple[str, ...]
    checkpoint: bool = True

    @property
    def requirements(self) -> Path:
        """The file with the versions of its environment."""
        return HERE / "requirements" / f"{self.environment}.txt"

    @property
    def bare_requirements(self) -> Path:
        """What is installed after them without what it asks for in turn; most have no such file."""
        return self.requirements.with_suffix(".no-deps.txt")

    @property
    def folder(self) -> Path:
        """Where its environment lies: below $DIFFOUNDRY_PEERS, else the user's cache; made anew for other versions."""
        files = [path for path in (self.requirements, self.bare_requirements) if path.is_file()]
        made_of = [*(path.read_text(encoding="utf-8") for path in files), list(sys.version_info[:2])]
        return home() / f"{self.environment}-{sha256_json(made_of)[:16]}"

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def command(self) -> list[str]:
        """The line that starts it. -E and -s: nothing of the caller's own Python comes before what it needs."""
        return [str(self.python), "-E", "-s", str(HERE / self.script[0]), *self.script[1:]]


PEERS = {
    "diffusers": Peer("diffusers, eager", ("diffusers_peer.py",), "diffusers", ("fp32", "bf16", "fp16")),
    "compile": Peer(
        "diffusers, torch.compile", ("diffusers_peer.py", "--compile"), "diffusers", ("fp32", "bf16", "fp16")
    ),
    "optimum": Peer("optimum, ONNX Runtime", ("optimum_peer.py",), "optimum", ("fp32",), checkpoint=False),
    "openvino-genai": Peer("OpenVINO GenAI", ("openvino_genai_peer.py",), "openvino-genai", ("fp32", "bf16")),
    "sdcpp": Peer("stable-diffusion.cpp", ("sdcpp_peer.py",), "sdcpp", ("fp32", "fp16")),
}


def home() -> Path:
    """The folder of all environments."""
    return Path(os.environ.get("DIFFOUNDRY_PEERS") or user_cache() / "peers").resolve()


def command(name: str) -> list[str]:
    """The line that starts a peer. Raises `BenchError` when its environment was not made, or not to the end."""
    peer = named(name)
    if not (peer.folder / WHOLE).is_file() or not peer.python.exists():
        raise BenchError(f"{name} is not set up: run `diffoundry bench --setup {name}`")
    return peer.command


def needs_checkpoint(name: str) -> bool:
    """Whether a peer reads the checkpoint that the bundle was compiled from."""
    return named(name).checkpoint


def precisions(name: str) -> tuple[str, ...]:
    """The precisions that a peer runs in."""
    return named(name).precisions


def named(name: str) -> Peer:
    """The peer called `name`. Raises `BenchError`."""
    try:
        return PEERS[name]
    except KeyError:
        raise BenchError(f"unknown peer {name!r}: choose one of {', '.join(PEERS)}") from None
