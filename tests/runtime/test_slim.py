"""A whole run in an interpreter where importing torch, diffusers, transformers and onnx raises."""

from __future__ import annotations

import subprocess
import sys

BLOCKER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "scipy"}:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKER + code], capture_output=True, text=True)


def test_the_command_line_draws_without_torch(bundle_of, tmp_path):
    out = tmp_path / "out.png"
    arguments = ["run", str(bundle_of("pico")), "a large red star at the left on a navy background"]
    arguments += ["--seed", "7", "--steps", "20", "-o", str(out)]
    done = run(f"sys.argv[1:] = {arguments!r}\nfrom diffoundry.cli import main\nmain()")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_verify_and_inspect_need_no_torch(bundle_of):
    for verb in ("verify", "inspect"):
        done = run(f"sys.argv[1:] = [{verb!r}, {str(bundle_of('pico'))!r}]\nfrom diffoundry.cli import main\nmain()")
        assert done.returncode == 0, done.stderr


def test_compile_says_what_to_install(tmp_path):
    code = "import importlib.metadata as m\n"
    code += "real = m.version\n"
    code += "def version(name):\n    if name == 'torch': raise m.PackageNotFoundError(name)\n    return real(name)\n"
    code += "m.version = version\n"
    code += f"sys.argv[1:] = ['compile', 'x', '-o', {str(tmp_path / 'b')!r}]\nfrom diffoundry.cli import main\nmain()"
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.strip() == "Error: compile needs torch: run `pip install 'diffoundry[export]'`"
