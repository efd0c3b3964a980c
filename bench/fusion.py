"""What writing the graphs for `onnxruntime:cuda` takes, and what they are made of, before and after.

python -m diffoundry.examples.random_checkpoint sdxl build/sdxl
diffoundry compile build/sdxl -o build/sdxl.bundle --precision fp16
python -m diffoundry.bench.fusion build/sdxl.bundle

Time and memory are those of the passes over one component, in a process of its own, with weights read and written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import click

from ..bundle import Bundle
from ..common.errors import BundleError
from ..common.files import link_or_copy

_EVERY = 0.005
"""Seconds between two looks at the memory."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", help="Of the models. [default: the bundle's]")
@click.option("--component", hidden=True)
def main(bundle: Path, precision: str | None, component: str | None) -> None:
    """Print a JSON object for each component: seconds, memory in MiB, and operators before and after."""
    try:
        opened = Bundle.open(bundle)
    except BundleError as error:
        raise click.ClickException(str(error)) from None
    chosen = precision or opened.manifest.precision
    lacking = [
        n for n, part in opened.manifest.components.items() if part.role != "step" and chosen not in part.precisions
    ]
    if lacking:
        raise click.ClickException(
            f"{bundle} has no {chosen} model of {lacking[0]}: see `diffoundry build --precision`"
        )
    if component is not None:
        print(json.dumps({"component": component, "precision": chosen, **_measured(opened, component, chosen)}))
        return
    for name, part in opened.manifest.components.items():
        if part.role != "step":
            line = [sys.executable, "-m", "diffoundry.bench.fusion", str(bundle), "--precision", chosen]
            subprocess.run([*line, "--component", name], check=True)


def _measured(bundle: Bundle, name: str, precision: str) -> dict[str, object]:
    from ..engines.fusion.cuda import fuse_for_cuda
    from ..engines.fusion.graph import open_model

    variant = bundle.component(name).variants[f"{precision}/onnx"]
    per_prompt = bundle.manifest.per_prompt(name)
    with tempfile.TemporaryDirectory(dir=bundle.root.parent) as folder:
        for path in variant.files:
            link_or_copy(bundle.path(path), Path(folder) / Path(path).name)
        source = Path(folder) / Path(variant.model).name
        before = open_model(source)
        largest = max(value.const_value.nbytes for value in before.graph.initializers.values())
        operators = Counter(node.op_type for node in before.graph)
        del before
        peak, started = _Peak(), time.perf_counter()
        whole, once = fuse_for_cuda(source, per_prompt)
        seconds, grown = time.perf_counter() - started, peak.stop()
        after = Counter(node.op_type for path in (whole[0], *once[:1]) for node in open_model(path).graph)
        shutil.rmtree(folder)
        Path(folder).mkdir()
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(grown / 2**20),
        "largest_weight_mib": round(largest / 2**20),
        "nodes": [operators.total(), after.total()],
        "operators": {kind: [operators[kind], after[kind]] for kind in sorted({*operators, *after})},
    }


class _Peak:
    """By how much the memory of this process grows at most; pages of files do not count."""

    def __init__(self) -> None:
        self._first = self._most = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The growth in bytes."""
        self._done.set()
        self._thread.join()
        return self._most - self._first

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
