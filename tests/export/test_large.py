"""Stable Diffusion 1.5 and XL at their full size, with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffoundry.bundle import Bundle

pytestmark = pytest.mark.slow
GIB = 2**30
MOST_MEMORY = 20 * GIB
CHECKPOINT_BYTES, BUNDLE_BYTES = 7 * GIB, 14 * GIB
COMPILE = """
import resource, sys, diffoundry
diffoundry.compile(sys.argv[1], sys.argv[2], storage_dtype=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("storage", ["fp32", "auto"])
def test_sdxl_compiles_within_the_memory_of_a_workstation(tmp_path, storage):
    """In half precision within 2 GiB more than the checkpoint's weights, which are then on the disk once."""
    if shutil.disk_usage(tmp_path).free < CHECKPOINT_BYTES + BUNDLE_BYTES:
        pytest.skip(f"needs {(CHECKPOINT_BYTES + BUNDLE_BYTES) // GIB} GiB of disk")
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < MOST_MEMORY:
        pytest.skip("needs 20 GiB of memory")
    made = [sys.executable, "-m", "diffoundry.examples.random_checkpoint", "sdxl", tmp_path / "sdxl"]
    subprocess.run(made, check=True)
    weights = sum(path.stat().st_size for path in tmp_path.glob("sdxl/*/*.safetensors"))
    line = [sys.executable, "-c", COMPILE, tmp_path / "sdxl", tmp_path / "sdxl.bundle", storage]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    bundle = Bundle.open(tmp_path / "sdxl.bundle")
    size = sum(path.stat().st_size for path in bundle.root.rglob("*") if path.is_file())
    print(f"weights {weights / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, bundle {size / GIB:.2f} GiB")
    assert peak <= (MOST_MEMORY if storage == "fp32" else weights + 2 * GIB)
    assert size <= 1.05 * weights * (2 if storage == "fp32" else 1)
    parity = json.loads((bundle.root / "reports" / "parity.json").read_text())
    assert set(parity) == set(bundle.manifest.components)
    assert all(len(parity[name]["cases"]) >= 3 for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"))


MOST_MEMORY_OF_PLANS = 14 * GIB


def _resident(pid):
    """Bytes that a process and its children hold now: shared pages of mapped files count once for each."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines() if ":" in line)
            if int(path.name) == pid or int(status["PPid"]) == pid:
                total += int(status["VmRSS"].split()[0]) * 1024
        except (OSError, LookupError, ValueError):
            continue
    return total


def test_plans_of_sd15_in_fp16_are_built_within_the_memory_of_a_laptop(tmp_path):
    """The whole compile with the scan and the builder in its own process; the scan is short, its memory is not."""
    pytest.importorskip("tensorrt_rtx")
    if shutil.disk_usage(tmp_path).free < 16 * GIB:
        pytest.skip("needs 16 GiB of disk")
    made = [sys.executable, "-m", "diffoundry.examples.random_checkpoint", "sd15", tmp_path / "sd15"]
    subprocess.run(made, check=True)
    line = [sys.executable, "-m", "diffoundry", "compile", tmp_path / "sd15", "-o", tmp_path / "sd15.bundle"]
    line += ["--engine", "tensorrt-rtx", "--arch", "sm89,sm120", "--precision", "fp16"]
    line += ["--scan-steps", "2", "--scan-size", "256x256"]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(line) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.2)
    assert process.returncode == 0
    print(f"compile: {time.monotonic() - started:.0f} s, peak of all processes {peak / GIB:.2f} GiB")
    records = [json.loads(path.read_text()) for path in tmp_path.glob("sd15.bundle/engines/*/engine.json")]
    for record in sorted(records, key=lambda record: record["component"]):
        size = sum(path.stat().st_size for path in (tmp_path / "sd15.bundle/engines" / record["key"]).iterdir())
        print(
            f"{record['component']} {record['precision']}: built in {record['seconds']:.0f} s "
            f"with {record['peak_bytes'] / GIB:.2f} GiB, {size / 1e6:.0f} MB, {record['made_of']}"
        )
    assert peak <= MOST_MEMORY_OF_PLANS
    assert {record["component"]: record["precision"] for record in records} == {
        "text_encoder": "fp16",
        "vae_encoder": "fp16",
        "vae_decoder": "fp16",
        "unet": "fp16",
        "step": "fp32",
    }
    unet = next(record for record in records if record["component"] == "unet")
    assert unet["made_of"]["attention"] == {"fused": 32, "of": 32}
    assert not unet["made_of"]["not_in_precision"]
