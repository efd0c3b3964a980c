"""From process start to the first denoising step; and `import diffoundry`.

python -m diffoundry.bench.startup build/pico.bundle
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import click

_FIRST_STEP = """
import sys, time
from diffoundry import load
pipe = load(sys.argv[1])
def first(step, total, latents):
    print(time.time())
    return False
try:
    pipe("a red star", steps=20, seed=1, callback=first)
except Exception as error:
    if "stopped by the callback" not in str(error): raise
"""


@click.command()
@click.argument("bundle")
@click.option("--rounds", default=7, show_default=True)
def main(bundle: str, rounds: int) -> None:
    """Print medians in seconds; the bare interpreter's own start is printed beside them."""
    bare = [_process("pass") for _ in range(rounds)]
    imports = [_process("import diffoundry") for _ in range(rounds)]
    first = [_first_step(bundle) for _ in range(rounds + 1)][1:]
    print(f"python                     {statistics.median(bare):.3f} s")
    print(f"python + import diffoundry {statistics.median(imports):.3f} s")
    print(f"process start to the end of the first step {statistics.median(first):.3f} s")


def _process(code: str) -> float:
    start = time.time()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.time() - start


def _first_step(bundle: str) -> float:
    start = time.time()
    done = subprocess.run([sys.executable, "-c", _FIRST_STEP, bundle], check=True, capture_output=True, text=True)
    return float(done.stdout) - start


if __name__ == "__main__":
    main()
