"""Stable Diffusion XL at its full size, with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from diffoundry.bundle import Bundle

pytestmark = pytest.mark.slow
GIB = 2**30
MOST_MEMORY = 20 * GIB
CHECKPOINT_BYTES, BUNDLE_BYTES = 7 * GIB, 27 * GIB
COMPILE = """
import resource, sys, diffoundry
diffoundry.compile(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_sdxl_compiles_within_the_memory_of_a_workstation(tmp_path):
    if shutil.disk_usage(tmp_path).free < CHECKPOINT_BYTES + BUNDLE_BYTES:
        pytest.skip(f"needs {(CHECKPOINT_BYTES + BUNDLE_BYTES) // GIB} GiB of disk")
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < MOST_MEMORY:
        pytest.skip("needs 20 GiB of memory")
    made = [sys.executable, "-m", "diffoundry.examples.random_checkpoint", "sdxl", tmp_path / "sdxl"]
    subprocess.run(made, check=True)
    line = [sys.executable, "-c", COMPILE, tmp_path / "sdxl", tmp_path / "sdxl.bundle"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    print(f"peak {peak / GIB:.2f} GiB")
    assert peak <= MOST_MEMORY
    bundle = Bundle.open(tmp_path / "sdxl.bundle")
    parity = json.loads((bundle.root / "reports" / "parity.json").read_text())
    assert set(parity) == set(bundle.manifest.components)
    assert all(len(parity[name]["cases"]) >= 3 for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"))
