"""`diffoundry serve` as a process, and what it refuses before the first request."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from diffoundry.tests.serve.conftest import until


def fails(done, *words):
    assert done.returncode == 1, (done.returncode, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in line, (word, line)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_draws_what_it_has_before_it_ends(bundle_of, tmp_path, how):
    line = [sys.executable, "-m", "diffoundry", "serve", f"small={bundle_of('pico')}", "--port", "0", "--warm"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    shown = []
    threading.Thread(target=lambda: shown.extend(process.stderr), daemon=True).start()
    try:
        until(lambda: any("listening" in each for each in shown), 60)
        url = re.search(r"http://127\.0\.0\.1:\d+", "".join(shown))[0]
        assert "small: " in shown[0] and "onnxruntime" in shown[0] and "warm" in shown[1]
        body = json.dumps({"prompt": "a", "steps": 150, "n": 2}).encode()
        asked = urllib.request.Request(
            f"{url}/v1/images/generations", body, {"content-type": "application/json"}, method="POST"
        )
        answers = []
        drawing = threading.Thread(target=lambda: answers.append(json.load(urllib.request.urlopen(asked))))
        drawing.start()
        until(lambda: b"diffoundry_moving_images 2.0" in urllib.request.urlopen(f"{url}/metrics").read())
        process.send_signal(how)
        drawing.join(30)
        assert len(answers[0]["data"]) == 2
        assert process.wait(20) == (0 if how == signal.SIGINT else -how)
    finally:
        process.kill()
    assert not [each for each in shown if "Traceback" in each or each.startswith("Error")]


def test_a_port_in_use(called, bundle_of):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(called("serve", bundle_of("pico"), "--port", port), f"port {port}", "in use", "--port")


def test_a_host_that_is_not_there(called, bundle_of):
    fails(called("serve", bundle_of("pico"), "--host", "203.0.113.77"), "cannot listen on 203.0.113.77")


def test_a_bundle_that_was_changed(called, copied):
    (copied / "unet" / "config.json").write_text("{}", encoding="utf-8")
    fails(called("serve", copied, "--port", "0"), "unet/config.json was changed")


def test_other_bad_input(called, bundle_of, tmp_path):
    pico = bundle_of("pico")
    fails(called("serve", tmp_path, "--port", "0"), "bundle.json")
    fails(called("serve", pico, "--api-key-file", tmp_path / "none"), "none", "a key a line")
    fails(called("serve", f"a={pico}", f"a={pico}"), "two bundles are called a")
    fails(called("serve", pico, "--memory", "0.001", "--port", "0"), "--memory")
    fails(called("serve", pico, "--lora", f"style={tmp_path / 'none'}", "--port", "0"), "--lora style")
    fails(called("serve", pico, "--cors", "http://site.example/page"), "cors", "https://example.org", "/page")
    for option, value in (("--patience", "0.5"), ("--patience", "nan"), ("--drain", "nan"), ("--drain", "inf")):
        done = called("serve", pico, option, value)
        assert done.returncode == 2 and option in done.stderr, (option, value)
    done = called("serve", pico, "--lora", "style")
    assert done.returncode == 2 and "NAME=FILE" in done.stderr


@pytest.mark.slow
def test_a_lora_that_is_refused_is_so_by_the_model_that_takes_some(called, bundle_of, tmp_path):
    bundles = [f"{name}={bundle_of(each)}" for name, each in (("plain", "pico"), ("lora", "pico+lora"))]
    done = called("serve", *bundles, "--lora", f"style={tmp_path / 'none'}", "--port", "0")
    fails(done, "--lora style", str(tmp_path / "none"))
    assert "takes no LoRAs" not in done.stderr


def test_the_extra_is_named_where_it_is_missing(called, bundle_of, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffoundry.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.responses", None)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    fails(called("serve", bundle_of("pico")), "pip install 'diffoundry[serve]'")


@pytest.mark.slow
def test_requests_that_share_a_batch_with_controls_and_loras(bundle_of, checkpoint_of):
    """Each picture of three models in one server is that of `run`, whatever is drawn beside it."""
    import base64
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from PIL import Image

    import diffoundry
    from diffoundry import Control, Lora, Request
    from diffoundry.tests.serve.conftest import picture, png, serving

    names = {"pico": "pico", "lora": "pico+lora", "steered": "pico+control+union+image-plus", "large": "sd15-small"}
    bundles = {name: bundle_of(each) for name, each in names.items()}
    files = {kind: str(checkpoint_of(f"pico+lora-{kind}")) for kind in ("peft", "kohya")}
    edges = Image.new("RGB", (64, 64))
    edges.paste((255, 255, 255), (20, 20, 44, 44))
    asked = []
    for i, steps in enumerate((4, 9, 17)):
        for scheduler in ("euler_a", "ddim", "dpm++2m"):
            same = {"prompt": "a large red star", "seed": i, "steps": steps, "scheduler": scheduler}
            asked += [("pico", same, {}), ("large", {**same, "steps": 3, "width": 64, "height": 64}, {})]
            for kind in files:
                lora = Lora(files[kind], 0.5 + 0.1 * i)
                asked.append(
                    ("lora", {**same, "loras": [{"name": kind, "strength": lora.strength}]}, {"loras": [lora]})
                )
            data = base64.b64encode(png(edges)).decode()
            control = {"name": "edge", "scale": 0.5 + 0.2 * i}
            own = {"control": [Control("edge", edges, scale=control["scale"])]}
            asked.append(("steered", {**same, "control": [{**control, "image": data}]}, own))
    options = {"rows": 6, "queue": 100, "patience": math.inf, "loras": files}
    with serving(bundles, **options) as served, served.client() as client:

        def ask(each):
            name, options, _ = each
            extra = {key: value for key, value in options.items() if key != "prompt"}
            return client.images.generate(model=name, prompt=options["prompt"], extra_body=extra).data[0].b64_json

        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(ask, asked))
        colors = [Image.new("RGB", (64, 64), color) for color in ("navy", "red", "white")]
        pictures = [(f"{i}.png", png(each)) for i, each in enumerate(colors)]
        extra = {"seed": 3, "steps": 5}
        edited = client.images.edit(model="steered", image=pictures, prompt="a star", extra_body=extra)
        until(served.is_idle)
    pipe = diffoundry.load(bundles["steered"])
    (adapter,) = pipe.bundle.manifest.wiring.image_prompts
    beside = [diffoundry.ImagePrompt(adapter, colors[1:])]
    wanted = pipe.generate(Request("a star", image=colors[0], image_prompt=beside, **extra)).images[0]
    assert np.abs(picture(edited.data[0].b64_json).astype(int) - np.asarray(wanted)).max() <= 1
    pipes = {name: diffoundry.load(path) for name, path in bundles.items()}
    for data, (name, options, own) in zip(found, asked, strict=True):
        wanted = pipes[name].generate(Request(**{**options, **own})).images[0]
        difference = np.abs(picture(data).astype(int) - np.asarray(wanted)).max()
        assert difference <= 1, (name, options["steps"], options["scheduler"], difference)
