"""The page at `/`: as a file, and in a real Chromium, against a server that draws.

`SCREENSHOTS=docs python -m pytest tests/serve/test_page.py -k screenshots` makes the pictures of the documentation.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

import diffoundry
from diffoundry import Conditioning, Control, Guidance, ImagePrompt, Lora, Request
from diffoundry.cli.serve import serve_command
from diffoundry.runtime.names import SAME
from diffoundry.serve import page
from diffoundry.serve.errors import refusal
from diffoundry.serve.fields import _NOTHING, KNOWN, field_in, read_fields
from diffoundry.serve.guard import Key
from diffoundry.serve.models import Model
from diffoundry.serve.service import hidden
from diffoundry.tests.serve.browser import PROGRAM, chromium
from diffoundry.tests.serve.conftest import png, serving, until

PAGE = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
SCRIPT = re.search(r"<script>(.*)</script>", PAGE, re.DOTALL)[1]
PROMPT = "a large red star at the left on a navy background"
SECRET = "sk-page-0123456789"
CONTROLS = ("input", "select", "textarea", "button", "canvas")
real = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")


class Elements(HTMLParser):
    """The elements of the page: (tag, attributes, the tags and attributes around it), and the text in each."""

    def __init__(self):
        super().__init__()
        self.found, self._open = [], []
        self.feed(PAGE)

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [(each[0], each[1]) for each in self._open], [])
        self.found.append(element)
        if tag not in ("input", "meta", "link", "img", "br"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, tag

    def handle_data(self, data):
        for element in self._open:
            element[3].append(data)


@pytest.fixture(scope="module")
def elements():
    return Elements().found


def test_it_is_served_with_a_policy_that_fits_it(idle):
    with httpx2.Client(base_url=idle.url) as http:
        answer = http.get("/")
        assert http.head("/").status_code == 200 and http.post("/").status_code == 405
    assert answer.text == PAGE and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    for kind in ("script", "style"):
        [content] = re.findall(rf"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_it_asks_for_nothing_from_elsewhere(elements):
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", PAGE)
    for tag, attributes, _, _ in elements:
        assert not (tag == "script" and "src" in attributes) and "style" not in attributes, attributes
        assert not any(name.startswith("on") for name in attributes), attributes
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", SCRIPT)


def test_every_id_is_there_once(elements):
    ids = [attributes["id"] for _, attributes, _, _ in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"\$\(\"([\w-]+)\"\)", SCRIPT))
    assert len(used) > 50 and used <= set(ids), used - set(ids)
    said = [
        attributes.get(name, "") for _, attributes, _, _ in elements for name in ("aria-labelledby", "aria-describedby")
    ]
    assert {each for each in said if each} <= set(ids)


def test_everything_has_a_name(elements):
    named = {attributes.get("for") for tag, attributes, _, _ in elements if tag == "label"}
    for tag, attributes, around, text in elements:
        if tag not in CONTROLS or attributes.get("aria-hidden"):
            continue
        in_label = any(each[0] == "label" for each in around)
        has = attributes.get("aria-label") or attributes.get("id") in named or in_label or "".join(text).strip()
        assert has, (tag, attributes)


ELSEWHERE = {
    **dict.fromkeys(_NOTHING, "asks for nothing here"),
    **dict.fromkeys(SAME, "another name of a field that the page sends"),
    **dict.fromkeys(("guidance_scale", "count", "size"), "another name of what the page sends"),
    "output": "the server gives pictures, and no latents",
    "output_format": "the gallery keeps PNGs, whose record makes them again",
    "output_compression": "PNGs lose nothing",
    "stream": "jobs have events in its place",
    "user": "changes nothing",
    "safety_identifier": "changes nothing",
    "priority": "is of the queue, for programs that know what can wait, and for keys that may ask for it",
    "deadline": "is for programs: a person cancels",
    "loras.file": "the server names LoRAs, and opens no path of a request",
    "loras.ignore_unused": "the server takes no LoRA with it",
    "loras.approximate": "the server takes no LoRA with it",
}
"""The fields of a request that the page cannot set, and why. All others it can."""
_PARTS = {"control": Control, "image_prompt": ImagePrompt, "loras": Lora}
_PARTS |= dict.fromkeys(("conditioning", "negative_conditioning"), Conditioning)


def inside(elements, template):
    """The parts that can be set in a template."""
    within = [each for each in elements if any(around[1].get("id") == template for around in each[2])]
    return {attributes["data-part"] for _, attributes, _, _ in within if "data-part" in attributes}


def test_what_it_cannot_set_is_listed_with_the_reason(elements):
    known = {*KNOWN, *(f"{name}.{item.name}" for name, kind in _PARTS.items() for item in dataclasses.fields(kind))}
    known -= {"conditioning", "negative_conditioning"}  # which their parts are
    sent = {
        attributes[name]
        for _, attributes, _, _ in elements
        for name in ("data-field", "data-embeds", "data-of")
        if name in attributes
    }
    assert "addNegative();" in SCRIPT
    sent |= {f"negative_{each}" for each in sent if each.startswith("conditioning.")}  # which that makes
    sent |= {"model"} | (known & set(re.findall(r"\bbody\.(\w+)", SCRIPT)))
    templates = {"control": ("control-row",), "image_prompt": ("adapter-row", "shot"), "loras": ("lora-row",)}
    for name, ids in templates.items():
        parts = set().union(*(inside(elements, each) for each in ids)) - {"scales"}
        sent |= {f"{name}.{each}" for each in parts | ({"name"} if name != "loras" else set())}
    assert not sent - known, "the server does not know it"
    assert not sent & set(ELSEWHERE), "it is listed, and can be set"
    assert sent | set(ELSEWHERE) == known, "it can be set, or is listed with the reason"


def test_what_needs_a_field_of_the_model_names_one(elements):
    needs = {attributes["data-needs"] for _, attributes, _, _ in elements if "data-needs" in attributes}
    known = {*KNOWN, *(f"guidance.{item.name}" for item in dataclasses.fields(Guidance))}
    known |= {
        f"{name}.{item.name}"
        for name in ("conditioning", "negative_conditioning")
        for item in dataclasses.fields(Conditioning)
    }
    assert len(needs) > 30 and needs <= known, needs - known
    for _, attributes, _, _ in elements:
        if "data-at" in attributes:
            assert attributes["data-at"] in ("0", "1") and attributes["data-name"], attributes


def test_phones_have_the_keys_that_a_number_needs(elements):
    """Where numbers alone are asked for, a phone's keyboard may have no minus, and no comma."""
    asked = [attributes for _, attributes, _, _ in elements if "inputmode" in attributes]
    assert len(asked) > 10 and all(each["type"] == "number" and float(each.get("min", 0)) >= 0 for each in asked)


def test_it_can_be_left_out_and_needs_no_key(bundle_of):
    bundles = {"pico": bundle_of("pico")}
    with serving(bundles, app={"with_page": False}) as served, httpx2.Client(base_url=served.url) as http:
        assert http.get("/").status_code == 404
    with serving(bundles, keys=[Key(SECRET, "a")]) as served, httpx2.Client(base_url=served.url) as http:
        assert http.get("/").status_code == 200 and http.get("/v1/models").status_code == 401


def test_the_command_can_leave_it_out(monkeypatch, bundle_of):
    asked = []
    monkeypatch.setattr("diffoundry.serve.server.serve", lambda options, say: asked.append(options.page))
    for more in ([], ["--no-page"]):
        serve_command.main([str(bundle_of("pico")), *more], standalone_mode=False)
    assert asked == [True, False]


@pytest.mark.parametrize("name", ["pico", "pico+control+union+image-plus", "sdxl-small"])
def test_what_a_model_says_it_can_is_what_it_takes(bundle_of, name):
    pipe = diffoundry.load(bundle_of(name))
    can, manifest = pipe.abilities(), pipe.bundle.manifest
    assert json.loads(json.dumps(can)) == can
    for scheduler in can["schedulers"]:
        assert pipe.job(Request("a", scheduler=scheduler)).record["scheduler"] == scheduler
    assert "euler_a" in can["schedulers"] and not any(each.startswith(("flow", "edm")) for each in can["schedulers"])
    image = Image.new("RGB", (manifest.default_width, manifest.default_height))
    pictures = {
        "txt2img": {},
        "img2img": {"image": image},
        "inpaint": {"image": image, "mask": Image.new("L", image.size, 255)},
    }
    values = {
        "negative_prompt": "b",
        "prompt_2": "c",
        "clip_skip": 1,
        "weights": True,
        "windows": True,
        "strength": 0.5,
        "padding_mask_crop": 4,
        "resize": "crop",
        "tiled": True,
        "forecast": True,
        "max_sequence_length": 70,
    }
    for task, fields in can["fields"].items():
        for field, value in values.items():
            request = Request("a", scheduler="euler", steps=40, **{**pictures[task], field: value})
            if field in fields:
                pipe.job(request)
            else:
                with pytest.raises(diffoundry.RequestError, match="has no effect"):
                    pipe.job(request)
    assert can["clip_skip"] >= 1 and can["max_sequence_length"] == 0
    assert can["strength"] == {"img2img": 0.8, "inpaint": 1.0}
    assert ("prompt_2" in can["fields"]["txt2img"]) == (name == "sdxl-small")
    assert can["pictured"] == list(manifest.wiring.image_prompts)
    assert all(len(modes) == manifest.wiring.controls[each].modes for each, modes in can["control_modes"].items())
    assert bool(can["control_modes"]) == ("union" in name)
    assert (can["layers"], can["decoders"], can["masked_controls"]) == (0, ["full"], [])
    assert can["guess_modes"] == list(manifest.wiring.controls)
    assert can["several"] == can["regions"] == list(can["attentions"]) == list(manifest.wiring.image_prompts)


@pytest.fixture(scope="module")
def steered(bundle_of):
    return Model("steered", diffoundry.load(bundle_of("pico+control+union+image-plus")))


SMALL = base64.b64encode(png(Image.new("RGB", (64, 64)))).decode()


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("control", {"control": [{"name": "edge", "image": SMALL, "interval": [0.7, 0.5]}]}),
        ("control", {"control": [{"name": "edge", "image": SMALL, "mask": SMALL}]}),
        ("control", {"control": [{"name": "edge", "image": "x"}]}),
        ("control", {"control": [{"name": "corner", "image": SMALL}]}),
        ("control", {"control": [{"name": "union", "image": SMALL, "mode": "corner"}]}),
        ("control", {"control": [{"name": "edge", "image": SMALL, "guess_mode": 1}]}),
        ("image_prompt", {"image_prompt": [{"name": "plus", "image": SMALL, "scale": [1, 2]}]}),
        ("image_prompt", {"image_prompt": [{"name": "plus", "image": []}]}),
        ("image_prompt", {"image_prompt": [{"name": "plus", "image": [SMALL, "x"]}]}),
        ("image_prompt", {"image_prompt": [{"image": SMALL, "negative": SMALL}], "guidance": 1}),
        ("loras", {"loras": ["corner"]}),
        ("guidance_interval", {"guidance_interval": [0.7, 0.5]}),
        ("guidance_rescale", {"guidance_rescale": 2}),
        ("guidance_mode", {"guidance_mode": "corner"}),
        ("skip_guidance_layers", {"skip_guidance_layers": [1]}),
        ("conditioning", {"conditioning": {"crop": [1]}}),
        ("conditioning", {"conditioning": {"original_size": [1, 2]}}),
        ("negative_conditioning", {"negative_conditioning": {"crop": [1, 2]}}),
        ("scheduler", {"scheduler": "corner"}),
        ("decoder", {"decoder": "tiny"}),
        ("prompt_embeds", {"prompt": "", "prompt_embeds": [1, 2]}),
        ("seed", {"seed": 2**64 - 1, "n": 2}),
    ],
)
def test_what_is_wrong_is_said_of_a_field(steered, param, given):
    with pytest.raises(diffoundry.RequestError) as refused:
        steered.pipeline.job(read_fields({"prompt": "a", **given}, steered, most_priority=0).request)
    said = refusal(refused.value, hidden(steered))
    assert (said.param or field_in(said.message)) == param, said.message


def test_a_field_is_found_behind_common_words():
    assert field_in("this model needs pooled_prompt_embeds beside prompt_embeds") == "pooled_prompt_embeds"
    assert field_in("this model cannot do this") is None


# --- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@contextmanager
def several(bundle_of, checkpoint_of, warm=False, **more):
    """A server of models, one with controls and one that takes LoRAs."""
    names = {"pico": "pico", "steered": "pico+control+union+image-plus", "lora": "pico+lora", **more}
    bundles = {name: bundle_of(each) for name, each in names.items()}
    loras = {"style": str(checkpoint_of("pico+lora-peft"))}
    with serving(bundles, rows=4, queue=60, patience=math.inf, loras=loras, warm=warm) as running:
        yield running


@pytest.fixture(scope="module")
def many(bundle_of, checkpoint_of):
    with several(bundle_of, checkpoint_of, warm=True) as running:
        yield running


@pytest.fixture
def opened(browser, many):
    """Opens the page in a tab with a profile of its own, which must have nothing to complain about in the end."""
    tabs = []

    def get(width=1280, height=860, before="", **how):
        tab = browser.tab()
        tabs.append(tab)
        tab.look(width, height, **how)
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=before)
        tab.open(f"{many.url}/")
        tab.until("!document.querySelector('#draw').disabled")
        return tab

    yield get
    for tab in tabs:
        assert not tab.complaints
        assert all(url.startswith((f"{many.url}/", "blob:", "data:")) for url in tab.asked), tab.asked
        tab.send("Page.close")
    until(many.is_idle)


def fill(tab, **fields):
    for name, value in fields.items():
        tab.write(f"#{name}", str(value))


def draw(tab, **fields):
    """Draw to the end, and return what is newest in the gallery: pixels, and its settings."""
    before = tab.run("gallery.all.length")
    fill(tab, **fields)
    tab.click("#draw")
    tab.until(f"gallery.all.length > {before} && document.querySelector('.job.ended .tile:not(:disabled)')")
    return newest(tab)


def newest(tab):
    return pixels(tab, "gallery.all[0].blob"), tab.run("gallery.all[0].settings")


def pixels(tab, blob):
    data = tab.run(f"base64Of({blob})")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def near(found, wanted):
    assert found.shape == np.asarray(wanted).shape
    assert np.abs(found - np.asarray(wanted).astype(int)).max() <= 1


def text(tab, selector):
    return tab.run(f"document.querySelector({json.dumps(selector)}).textContent")


def middle_of(tab, selector, *places):
    """Points of an element, from shares of its width and height."""
    x, y, width, height = tab.box(selector)
    return [(x + width * each[0], y + height * each[1]) for each in places]


@real
@pytest.mark.slow
def test_pictures_appear_while_they_are_drawn_and_stay(opened, pipe):
    tab = opened()
    assert tab.run("document.activeElement === document.body")
    fill(tab, prompt=PROMPT, seed=7, steps=200, n=2)
    tab.press("Enter", modifiers=2)  # Ctrl
    tab.until("document.querySelectorAll('.job:not(.ended) .tile img').length === 2")
    tab.until(r"/^Step \d+ of 400 · about \d+ s left$/.test(document.querySelector('.job .line p').textContent)")
    assert 0 < tab.run("document.querySelector('.job progress').value") <= 400
    tab.until("document.querySelector('.job.ended')")
    tab.until("gallery.all.length === 2 && document.querySelector('#status').textContent")
    assert text(tab, "#status") == "2 pictures are there." and "Seed 7, 8" in text(tab, ".job .line p")
    found, own = newest(tab)
    near(found, pipe.generate(Request(PROMPT, seed=8, steps=200)).images[0])
    assert (own["seed"], own["n"], own["model"]) == (8, 1, "pico")
    assert Image.open(io.BytesIO(base64.b64decode(tab.run("base64Of(gallery.all[0].blob)")))).info  # with its record
    tab.reload()
    tab.until("document.querySelectorAll('#gallery li img').length === 2 && !document.querySelector('#draw').disabled")
    assert tab.run("document.querySelector('#prompt').value") == PROMPT
    tab.click("#reset")
    tab.click("#gallery li:last-child .tile")
    settings = text(tab, "#shown-settings")
    assert PROMPT in settings and "Seed7" in settings and "Steps200" in settings
    tab.click("#shown-again")
    tab.until("document.activeElement.id === 'draw' && document.querySelector('#seed').value === '7'")
    again, _ = draw(tab)
    near(again, pixels(tab, "gallery.all[2].blob"))
    tab.click("#gallery-clear")
    tab.click("#sure-yes")
    tab.until("!gallery.all.length && !document.querySelector('#gallery-empty').hidden")
    tab.reload()
    tab.until("gallery.base && !document.querySelector('#draw').disabled")
    assert tab.run("gallery.run('readonly', (store) => store.count())") == 0


@real
@pytest.mark.slow
def test_cancel_the_queue_and_a_page_that_is_loaded_again(opened, many):
    tab = opened()
    fill(tab, prompt="a", steps=900, n=4)
    tab.click("#draw")
    tab.until("document.querySelector('.job progress')?.value > 0")
    fill(tab, n=1)
    tab.click("#draw")
    tab.until("/^Waiting, place 1 in the queue · about/.test(document.querySelector('.job .line p').textContent)")
    tab.reload()
    tab.until("document.querySelectorAll('.job').length === 2")
    for left in (1, 0):
        tab.run("document.querySelector('.job .line button').focus()")
        tab.press("Enter")
        tab.until(f"document.querySelectorAll('.job').length === {left}")
    assert text(tab, "#status") == "Cancelled." and tab.run("document.activeElement.id") == "draw"
    assert tab.run("sessionStorage.getItem('jobs')") == "[]"
    until(many.is_idle)


@real
@pytest.mark.slow
@pytest.mark.parametrize("how", ["mouse", "touch", "keyboard"])
def test_a_mask_is_painted(opened, pipe, how):
    tab = opened(*((360, 780) if how == "touch" else (1280, 860)))
    source, _ = draw(tab, prompt=PROMPT, seed=7, steps=20)
    tab.click("#gallery .tile")
    tab.click("#shown-start")
    tab.until("state.source && !document.querySelector('#mask-edit').hidden")
    assert tab.run("document.querySelector('#strength').value") == "0.8"
    tab.click("#mask-edit")
    tab.until("document.activeElement.id === 'paint-over'")
    line = [(0.6 + i / 40, 0.3 + i / 25) for i in range(12)]
    points = middle_of(tab, "#paint-over", *line)
    if how == "mouse":
        tab.mouse("mousePressed", *points[0])
        for point in points:
            tab.mouse("mouseMoved", *point)
        tab.mouse("mouseReleased", *points[-1])
    elif how == "touch":
        tab.touch(points)
    else:
        tab.press("ArrowRight", "ArrowRight", "ArrowRight", " ", *["ArrowDown"] * 6, " ", "ArrowDown")
        assert "The brush is lifted, " in text(tab, "#paint-said")
    assert tab.run("state.source.strokes.length") == 1
    for button, count in (("#paint-invert", 2), ("#paint-undo", 1), ("#paint-clear", 2), ("#paint-undo", 1)):
        tab.click(button)
        assert tab.run("state.source.strokes.length") == count
    tab.click("#paint-done")
    tab.until("state.source.mask && !document.querySelector('#paint').open")
    assert tab.run("document.querySelector('#strength').value") == "1"
    fill(tab, prompt="a ring", seed=3, steps=10)
    found, own = draw(tab)
    mask = pixels(tab, "state.source.mask.blob")[..., 3] == 0
    assert 20 < mask.sum() < 1500 and mask[:, :10].sum() == 0
    image, mask = (Image.fromarray(each.astype(np.uint8)) for each in (source, mask * 255))
    near(found, pipe.generate(Request("a ring", seed=3, steps=10, image=image, mask=mask, strength=1.0)).images[0])
    assert "strength" in own and "image" not in own
    tab.click("#source-drop-it")
    tab.click("#gallery .tile")
    assert "a picture, with a mask" in text(tab, "#shown-settings")
    tab.click("#shown-again")
    tab.until("state.source?.mask")
    again, _ = draw(tab)
    near(again, found)


@real
@pytest.mark.slow
def test_controls_and_loras_of_models_that_have_them(opened, many, tmp_path, checkpoint_of, bundle_of):
    tab = opened()
    assert not tab.run("isThere(document.querySelector('#controls'))")
    edges = Image.new("RGB", (64, 64))
    edges.paste((255, 255, 255), (20, 20, 44, 44))
    (tmp_path / "edges.png").write_bytes(png(edges))
    choose_model(tab, "steered")
    assert tab.run("[...document.querySelectorAll('#controls h3')].map((each) => each.textContent)")[:2] == [
        "edge",
        "depth",
    ]
    tab.choose("#controls [data-name=edge] [type=file]", tmp_path / "edges.png")
    tab.until("rows().filter(isGiven).length === 1")
    slide(tab, "#controls [data-part=scale] input", 0.6)
    found, own = draw(tab, prompt=PROMPT, seed=5, steps=8)
    steered = diffoundry.load(bundle_of("pico+control+union+image-plus"))
    control = (Control("edge", edges, scale=0.6),)
    near(found, steered.generate(Request(PROMPT, seed=5, steps=8, control=control)).images[0])
    assert own["control"] == [{"name": "edge", "scale": 0.6}]
    choose_model(tab, "lora")
    assert tab.run("document.querySelector('#prompt').value") == PROMPT
    assert text(tab, "#loras i") == "style" and text(tab, "#loras .value") == "off"
    slide(tab, "#loras input", 0.8)
    assert text(tab, "#loras .value") == "0.80"
    found, own = draw(tab, prompt=PROMPT, seed=5, steps=8)
    changed = diffoundry.load(bundle_of("pico+lora"))
    lora = (Lora(checkpoint_of("pico+lora-peft"), 0.8),)
    near(found, changed.generate(Request(PROMPT, seed=5, steps=8, loras=lora)).images[0])
    assert own["loras"] == [{"name": "style", "strength": 0.8}]
    tab.run("show(gallery.all[1])")  # back to the model, the picture and the strength of before
    tab.click("#shown-again")
    tab.until("rows().filter(isGiven).length === 1 && document.querySelector('#model').value === 'steered'")
    again, _ = draw(tab)
    near(again, pixels(tab, "gallery.all[2].blob"))


def choose_model(tab, name):
    script = (
        f"const box = document.querySelector('#model'); box.value = '{name}'; box.dispatchEvent(new Event('change'))"
    )
    tab.run(f"{{ {script} }}")


def slide(tab, selector, value):
    script = f"const box = document.querySelector({json.dumps(selector)}); box.value = {value};"
    tab.run(f"{{ {script} box.dispatchEvent(new Event('input', {{ bubbles: true }})) }}")


@real
@pytest.mark.slow
def test_what_is_wrong_is_said_in_words(opened):
    tab = opened()
    cases = [
        ({"steps": 0, "prompt": "a"}, "Steps must be from 1 to 1000.", "steps"),
        ({"steps": 4, "width": 60}, "Width must be a multiple of 8.", "width"),
        ({"width": 64, "prompt": ""}, "Write what is to be seen.", "prompt"),
    ]
    for fields, said, at in cases:
        fill(tab, **fields)
        tab.click("#draw")
        tab.until(f"document.querySelector('#wrong').textContent === {json.dumps(said)}")
        assert tab.run("document.activeElement.id") == at
        assert tab.run(f"document.querySelector('#{at}').getAttribute('aria-describedby')") == "wrong"
    fill(tab, prompt="a", width=64, guidance=1)
    assert not tab.run("isThere(document.querySelector('#negative_prompt'))")
    fill(tab, guidance=7.5)
    assert tab.run("isThere(document.querySelector('#negative_prompt'))")
    with expected(tab, "400"):
        fill(tab, width=4096, height=4096)
        tab.click("#draw")
        tab.until(
            "document.querySelector('#wrong').textContent === '4096x4096 pixels are too many, 4194304 are the most.'"
        )
        assert tab.run("document.activeElement.id") == "width"
    fill(tab, width=64, height=64)
    tab.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    with expected(tab, "ERR_INTERNET_DISCONNECTED"):
        tab.click("#draw")
        tab.until("document.querySelector('#wrong').textContent.startsWith('The server cannot be reached')")
    tab.send("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    draw(tab)
    assert tab.run("document.querySelector('#wrong').hidden")
    tab.run("eventsOf = async function* () { throw new Error('lost') }; undefined")
    draw(tab)  # by asking again and again


@real
@pytest.mark.slow
def test_what_a_model_lacks_is_not_shown(opened):
    """A model that is given its guidance, has plans for two sizes, and starts from no picture."""
    tab = opened()
    always = ["count", "height", "prompt", "scheduler", "seed", "steps", "width", "guidance.scale", "forecast"]
    more = ["negative_prompt", "prompt_2", "guidance.true_cfg_scale", "max_sequence_length"]
    other = {
        "tasks": ["txt2img"],
        "fields": {"txt2img": always + more},
        "strength": {},
        "loras": [],
        "clip_skip": 0,
        "max_sequence_length": 512,
        "plans": [[[96, 64], [96, 64]], [[64, 64], [64, 64]], [[128, 128], [128, 128]]],
    }
    tab.run("pngOf(canvasOf(400, 200)).then(pictureOf).then(setSource)")
    assert tab.run("[task(), settings().width, settings().height, settings().strength]") == ["img2img", 88, 48, 0.8]
    tab.run(f"Object.assign(state.models[0].diffoundry, {json.dumps(other)}); chooseModel()")
    shown = (
        "[...document.querySelectorAll('#settings :is(input, select, textarea)')].filter(isThere).map(({ id }) => id)"
    )
    same = {"prompt", "prompt_2", "sizes", "steps", "guidance", "n", "seed", "scheduler", "forecast"}
    same |= {"true_cfg_scale", "max_sequence_length"}
    assert set(tab.run(shown)) == same and tab.run("task()") == "txt2img"
    assert tab.run("request().then(({ body }) => 'image' in body)") is False
    tab.run("document.querySelector('#more').open = true")
    fill(tab, true_cfg_scale=3)
    assert set(tab.run(shown)) == same | {"negative_prompt"}
    tab.run("setSize(3, 2)")
    sent = {"model": "pico", "prompt": "", "width": 96, "height": 64, "steps": 20, "guidance": 7.5, "n": 1}
    assert tab.run("settings()") == sent | {"true_cfg_scale": 3}
    tab.run("apply({ width: 136, height: 120 })")  # of another model
    assert text_of_size(tab) == "128x128"
    tab.click("#reset")
    assert text_of_size(tab) == "64x64"


def text_of_size(tab):
    return tab.run("drawnSize().join('x')")


@contextmanager
def expected(tab, words):
    """What the browser itself logs of an answer that is an error."""
    yield
    until(lambda: tab.run("1") and tab.complaints)
    assert all(words in each for each in tab.complaints), tab.complaints
    tab.complaints.clear()


def refused_at(tab, place, words):
    """The server refuses what is to be drawn, in these words, and the page goes to the field that is wrong."""
    with expected(tab, "400"):
        tab.click("#draw")
        tab.until(f"document.querySelector('#wrong').textContent.includes({json.dumps(words)})")
    assert tab.run("document.activeElement.id") == place


@real
@pytest.mark.slow
def test_a_server_that_wants_a_key(browser, bundle_of):
    with serving({"pico": bundle_of("pico")}, keys=[Key(SECRET, "a")]) as served:
        tab = browser.tab()
        tab.look(1280, 860)
        tab.open(f"{served.url}/")
        with expected(tab, "401"):
            tab.until("document.activeElement.id === 'key'")
            assert tab.run("document.querySelector('#wrong').hidden && document.querySelector('#settings').hidden")
            fill(tab, key="sk-another-0123456789")
            tab.press("Enter")
            unknown = "document.querySelector('#key-box #wrong')?.textContent === 'The server does not know this key.'"
            tab.until(unknown)
            tab.run("wrong('')")
            fill(tab, key="sk-of-three-€")  # which no header can say
            tab.press("Enter")
            tab.until(unknown)
            assert tab.run("sessionStorage.getItem('key')") == ""
        fill(tab, key=SECRET)
        tab.press("Enter")
        tab.until("!document.querySelector('#draw').disabled && document.querySelector('#key-box').hidden")
        draw(tab, prompt="a", steps=2)
        assert SECRET not in tab.run("JSON.stringify({ ...localStorage })")
        assert tab.run("sessionStorage.getItem('key')") == SECRET
        tab.run("session.set('key', 'sk-of-before-0123')")
        tab.run("state.embeds.set('pooled_prompt_embeds', { name: 'a', shape: [1] }); undefined")
        with expected(tab, "401"):
            tab.click("#draw")
            tab.until(unknown)
        fill(tab, key=SECRET)
        tab.press("Enter")
        tab.until("document.querySelector('#key-box').hidden")
        assert tab.run("state.embeds.size") == 1  # what was chosen is still there
        tab.reload()
        tab.until("!document.querySelector('#draw').disabled")
        assert not tab.complaints
        tab.send("Page.close")
        until(served.is_idle)


@real
@pytest.mark.slow
def test_more_jobs_than_a_browser_has_connections(opened):
    tab = opened(still=True)
    fill(tab, prompt="a", steps=900)
    for count in range(1, 9):
        tab.click("#draw")
        tab.until(f"document.querySelectorAll('.job').length === {count} && !document.querySelector('#draw').disabled")
    assert tab.run("streams") == 3
    for is_hidden, count in (("true", 0), ("false", 3)):
        tab.run(f"Object.defineProperty(document, 'hidden', {{ value: {is_hidden}, configurable: true }})")
        tab.run("document.dispatchEvent(new Event('visibilitychange'))")
        tab.until(f"streams === {count}")
    for left in reversed(range(8)):
        tab.run("document.querySelector('.job .line button').click()")
        tab.until(f"document.querySelectorAll('.job').length === {left}")
    assert tab.run("streams") == 0


@real
@pytest.mark.slow
def test_a_server_that_is_away_for_a_while(opened):
    tab = opened()
    fill(tab, prompt="a", steps=4)
    assert tab.run("[0, 401, 404, 429, 500, 503].filter((status) => isRefusal({ status }))") == [401, 404]
    tab.run(
        "{ const there = fetch; let lost = 5; window.fetch = (url, how) => /jobs\\/./.test(url) && lost-- > 0 "
        "? Promise.reject(new TypeError('lost')) : there(url, how) }"
    )
    tab.run(
        "request().then(async ({ body }) => { const sent = { ...body, response_format: 'b64_json' }; "
        "const job = await (await ask('/jobs', { method: 'POST', body: sent })).json(); "
        "remember({ id: job.id, settings: plain(sent), given: {} }); resume(); })"
    )
    tab.until("document.querySelector('.job .line p')?.textContent.startsWith('The connection is lost')")
    tab.until("gallery.all.length === 1 && !running().length")
    with expected(tab, "404"):
        tab.run("state.model = { ...state.model, id: 'gone' }; undefined")
        tab.click("#draw")
        tab.until("document.querySelector('#wrong').textContent.startsWith('There is no model')")
    assert tab.run("document.querySelector('#model').value") == ""  # so that each can be chosen
    choose_model(tab, "pico")
    assert tab.run("document.querySelector('#wrong').hidden")
    draw(tab)


FORBIDDEN = """for (const name of ['localStorage', 'sessionStorage', 'indexedDB']) {
    Object.defineProperty(window, name, { get() { throw new DOMException('not allowed', 'SecurityError'); } }); }"""


@real
@pytest.mark.slow
def test_a_browser_that_keeps_nothing_and_one_without_room(opened, many):
    tab = opened(before=FORBIDDEN)
    draw(tab, prompt="a", steps=2)
    assert tab.run("document.querySelector('#wrong').hidden && gallery.all[0].id") == "memory 1"
    assert text(tab, "#gallery-count") == "1 picture, kept until this page is closed"
    tab = opened()
    tab.run("drawnFrom('readwrite', (store) => store.put({ created: 1 }, 'of a tab that was closed'))")
    tab.run("drawnFrom('readwrite', (store) => store.put({ created: Date.now() }, 'of another tab'))")
    tab.reload()
    tab.until("!document.querySelector('#draw').disabled")
    tab.run("gallery.ready.then(resume)")
    assert tab.run("drawnFrom('readonly', (store) => store.getAllKeys())") == ["of another tab"]
    tab.run("gallery.base = null; gallery.ready = gallery.open(); undefined")
    tab.run("gallery.put({ blob: new Blob(['a']), settings: {} })")  # before those of before are there
    assert tab.run("gallery.all.length") == tab.run("gallery.run('readonly', (store) => store.count())") == 1
    tab = opened()
    tab.send("Storage.overrideQuotaForOrigin", origin=many.url, quotaSize=100_000)
    tab.run("gallery.put({ blob: new Blob([new Uint8Array(400_000)]), settings: {} })")
    assert text(tab, "#wrong").startswith("The browser has no room for another picture")
    assert tab.run("gallery.run('readonly', (store) => store.count())") == 0


COUNTED = """window.urls_made = 0;
    for (const [name, by] of [['createObjectURL', 1], ['revokeObjectURL', -1]]) {
        const its = URL[name].bind(URL); URL[name] = (what) => { if (what) urls_made += by; return its(what); }; }"""


@real
@pytest.mark.slow
def test_the_focus_a_key_that_is_held_and_pictures_that_are_removed(opened):
    tab = opened(before=COUNTED)
    fill(tab, prompt="a", steps=20, n=2)
    tab.run("document.querySelector('#draw').focus()")
    tab.press("Enter")
    tab.until("gallery.all.length === 2 && !document.querySelector('.waiting')")
    assert tab.run("document.activeElement.id") == "draw"
    tab.until("urls_made === 2")  # none of those on their way
    tab.run("document.querySelector('#gallery .tile').focus()")
    assert tab.run("gallery.put({ ...gallery.all[1] }).then(() => document.activeElement.className)") == "tile"
    tab.click("#gallery li:nth-child(2) .tile")
    tab.click("#shown-remove")
    tab.until("gallery.all.length === 2 && document.querySelectorAll('.job .tile').length === 1")
    tab.run("gallery.remove(gallery.all[1])")
    tab.until("!document.querySelector('.job') && gallery.all.length === 1")
    tab.run("gallery.clear()")
    assert tab.run("urls_made") == 0
    tab.run("document.querySelector('#prompt').focus()")
    before = sum(url.endswith("/v1/jobs") for url in tab.asked)
    fill(tab, n=1)
    for again in (False, True, True):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2, "autoRepeat": again}
        tab.send("Input.dispatchKeyEvent", type="keyDown", **key)
        tab.run("new Promise((done) => setTimeout(done, 300))")
    tab.press("Enter", modifiers=2)
    tab.press("Enter", modifiers=2)  # while the one before it is sent
    tab.until("gallery.all.length === 2 && !running().length")
    assert sum(url.endswith("/v1/jobs") for url in tab.asked) == before + 2


TRANSFER = """const given = new DataTransfer(); given.setData('text/plain', 'a word');
    given.items.add(new File([{picture}], 'a.png', {{ type: 'image/png' }}));"""


@real
@pytest.mark.slow
def test_what_is_pasted_dropped_or_too_long(opened):
    tab = opened()
    given = TRANSFER.format(picture="await pngOf(canvasOf(8, 8))")
    made = {
        "paste": "new ClipboardEvent('paste', { clipboardData: given, bubbles: true, cancelable: true })",
        "drop": "new DragEvent('drop', { dataTransfer: given, bubbles: true, cancelable: true })",
    }

    def taken(kind, at, *, words_alone=False):
        less = "given.items.remove(1);" if words_alone else ""
        return tab.run(
            f"(async () => {{ {given} {less} const event = {made[kind]}; "
            f"document.querySelector('{at}').dispatchEvent(event); return event.defaultPrevented; }})()"
        )

    assert not taken("paste", "#prompt") and taken("paste", "#draw")  # a text, of which there is a picture too
    tab.until("state.source")
    tab.run("setSource(null)")
    assert taken("drop", "#gallery-head") and not taken("drop", "#source-drop", words_alone=True)
    assert not tab.run("state.source") and taken("drop", "#source-drop")
    tab.until("state.source")
    tab.run("setSource(null)")
    tab.run("show({ blob: new Blob(['no picture']), settings: { prompt: 'a', seed: 1 } })")
    tab.click("#shown-start")
    tab.until("document.querySelector('#wrong').textContent.startsWith('This file is no picture')")
    fill(tab, prompt="a" * 40_000)
    refused_at(tab, "prompt", "This has 40000 letters, 32000 are the most.")


@real
@pytest.mark.slow
def test_a_wide_picture_is_painted_with_two_fingers(opened):
    tab = opened(360, 780)
    tab.run("pngOf(canvasOf(2000, 200)).then(pictureOf).then(setSource)")
    tab.click("#mask-edit")
    tab.until("document.activeElement.id === 'paint-over'")
    left, _, width, _ = tab.box("#paint-over")
    assert left > 0 and left + width < 360
    (x, y), (other_x, other_y), (end_x, end_y) = middle_of(tab, "#paint-over", (0.2, 0.2), (0.8, 0.8), (0.5, 0.2))
    one, two = {"x": x, "y": y, "id": 0}, {"x": other_x, "y": other_y, "id": 1}
    for kind, points in (
        ("touchStart", [one]),
        ("touchStart", [one, two]),
        ("touchEnd", [two]),
        ("touchMove", [{**one, "x": end_x, "y": end_y}]),
        ("touchEnd", []),
    ):
        tab.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert tab.run("state.source.strokes.map(({ points }) => Math.round(points.at(-1)[0] / 100))") == [10]
    tab.click("#paint-cancel")


@real
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_everything_has_a_name(opened, width, dark, tmp_path):
    tab = opened(width, 780, dark=dark, still=True)
    choose_model(tab, "steered")
    [(_, file)] = squares(tmp_path, (20, 20))
    for count, row in enumerate(("edge", "union", "plus"), 1):
        tab.choose(f"[data-name={row}] [data-part=image] input", file)
        tab.until(f"rows().filter(isGiven).length === {count}")
    draw(tab, prompt=PROMPT, steps=2)
    unfold(tab)
    shades = tab.run(
        "[document.body, document.querySelector('#prompt')].map((each) => getComputedStyle(each))"
        ".map((each) => [each.backgroundColor, each.color])"
    )
    for back, fore in shades:
        ratio = contrast(back, fore)
        assert ratio > 7 and (lightness(back) < lightness(fore)) == dark
    for opener, closer in ((None, None), ("#gallery .tile", "#shown-start"), ("#mask-edit", "#paint-cancel")):
        if opener:
            tab.click(opener)
        check_layout(tab, width)
        if closer:
            tab.click(closer)
            tab.until("!document.querySelector('dialog[open]')")
    assert tab.run("getComputedStyle(document.querySelector('.tile img')).animationName") == "none"


def check_layout(tab, width):
    assert tab.run("document.documentElement.scrollWidth") <= width
    out = tab.run(
        "[...document.querySelectorAll('button, input:not([type=checkbox]), select, textarea, dialog')]"
        ".filter((each) => each.checkVisibility() && !each.closest('.unseen'))"
        ".map((each) => [each.id || each.className, each.getBoundingClientRect()])"
        f".filter(([, box]) => box.left < 0 || box.right > {width} || box.height < 24).map(([name]) => name)"
    )
    assert not out, out
    until(lambda: not nameless(tab), 5)  # what was shown just now gets its name a little later


def nameless(tab):
    """What a screen reader would find no words for."""
    roles = ("button", "textbox", "spinbutton", "slider", "combobox", "checkbox", "dialog", "application", "image")
    nodes = [each for each in tab.send("Accessibility.getFullAXTree")["nodes"] if not each["ignored"]]
    found = [each for each in nodes if each.get("role", {}).get("value") in roles]
    assert len(found) > 5
    return [each for each in found if not each.get("name", {}).get("value", "").strip()]


def lightness(colour):
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((lightness(one), lightness(other)))
    return (high + 0.05) / (low + 0.05)


@real
@pytest.mark.slow
def test_screenshots(opened, tmp_path):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    tab = opened(1280, 860)
    scenes = (
        *("large cyan diamond at the right on a black", "large white ring at the bottom on a forest"),
        *("large blue triangle in the center on a beige", "small orange square at the bottom on a navy"),
        *("large purple heart in the center on a beige", "small yellow circle at the top on a maroon"),
        *("large green cross at the top on a gray", "large cyan diamond at the left on a maroon"),
    )
    for scene in scenes:
        draw(tab, prompt=f"a {scene} background", seed=7, steps=20)
    draw(tab, prompt=PROMPT, seed=7, steps=20, n=2)
    tab.run("new Promise((done) => setTimeout(done, 600))")
    tab.run("document.activeElement.blur(); scrollTo(0, 0)")
    tab.shot(folder / "serve-page.png")
    tab.look(360, 740, dark=True, scale=1.5)
    tab.run("scrollTo(0, 0)")
    in_one(
        tab,
        folder / "serve-page-phone.png",
        "scrollTo(0, 0)",
        "scrollTo(0, document.querySelector('.job').getBoundingClientRect().top + scrollY - 12)",
    )
    tab.look(360, 740, scale=1.5)
    choose_model(tab, "steered")
    (_, star), (_, square), (_, other) = squares(tmp_path, (4, 4), (36, 20), (20, 20))
    star.write_bytes(base64.b64decode(tab.run("base64Of(gallery.all[0].blob)")))
    square.write_bytes(base64.b64decode(tab.run("base64Of(gallery.all[2].blob)")))
    tab.choose("[data-name=edge] [type=file]", other)
    for count, file in enumerate((star, square), 1):
        tab.choose("[data-name=plus] [data-part=image] input", file)
        tab.until(f"document.querySelectorAll('.shots li').length === {count}")
    unfold(tab)
    put_in(tab, "[data-name=edge] [data-part=interval] input", 0)
    put_in(tab, "[data-name=edge] [data-part=interval] label + label input", 0.5)
    put(tab, guidance_interval=(0.7, 0.2))
    with expected(tab, "400"):
        tab.click("#draw")
        tab.until("!document.querySelector('#wrong').hidden")
    top = "scrollTo(0, document.querySelector('{}').getBoundingClientRect().top + scrollY - 12)".format
    tab.run("document.activeElement.blur()")
    in_one(tab, folder / "serve-page-more.png", top("#controls-box"), top("#adapters-box"), top("#more"))
    names = ("serve-page.png", "serve-page-phone.png", "serve-page-more.png")
    assert all((folder / name).stat().st_size < 300_000 for name in names)


def in_one(tab, path, *places):
    """Write pictures of the tab, scrolled to each of these places, side by side."""
    sides = []
    for where in places:
        tab.run(where)
        tab.run("new Promise((done) => setTimeout(done, 400))")
        tab.shot(path)
        sides.append(Image.open(path).convert("RGB"))
    wide = sides[0].width + 24
    both = Image.new("RGB", (wide * len(sides) - 24, sides[0].height), (120, 124, 128))
    for i, side in enumerate(sides):
        both.paste(side, (i * wide, 0))
    both.save(path, optimize=True)


# --- Every other setting ---------------------------------------------------------------------------------------------

FLOW = "sd3-small+dit-inpaint+image-look"


@pytest.fixture(scope="module")
def rare(bundle_of, checkpoint_of):
    """A server of models that have, together, every setting that there is."""
    more = {"sdxl": "sdxl-small", "flow": FLOW, "flux": "flux-dev-small", "face": "pico+image-face"}
    with several(bundle_of, checkpoint_of, **more) as running:
        yield running


@pytest.fixture
def walked(browser, rare):
    """As `opened`, for these models, on a phone."""
    tab = browser.tab()
    tab.look(360, 780, still=True)
    tab.open(f"{rare.url}/")
    tab.until("!document.querySelector('#draw').disabled")
    yield tab
    assert not tab.complaints
    assert all(url.startswith((f"{rare.url}/", "blob:", "data:")) for url in tab.asked), tab.asked
    tab.send("Page.close")
    until(rare.is_idle)


def put(tab, **values):
    """Set inputs by their fields; of two numbers that are one field, both."""
    for field, value in values.items():
        for at, each in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            place = f"[data-field={field}]" + (f"[data-at='{at}']" if at is not None else "")
            put_in(tab, f"#ask {place}", each)


def put_in(tab, selector, value):
    """Set an input that is there, as a person does."""
    name = "checked" if isinstance(value, bool) else "value"
    script = f"const box = document.querySelector({json.dumps(selector)}); if (!isThere(box)) throw box.id;"
    tab.run(
        f"{{ {script} box.{name} = {json.dumps(value)}; box.dispatchEvent(new Event('input', {{bubbles: true}})) }}"
    )


def drawn_again(tab, pipe, wanted):
    """Draw; then bring it all back from the gallery of a page that was opened anew, and draw again."""
    unfold(tab)
    check_layout(tab, 360)
    asked = tab.run("request().then(({ body }) => JSON.stringify(body))")
    found, own = draw(tab)
    near(found, pipe.generate(wanted).images[0])
    tab.run("for (const name of Object.keys(localStorage)) localStorage.removeItem(name)")
    tab.reload()
    tab.until("!document.querySelector('#draw').disabled && document.querySelector('#gallery .tile')")
    assert tab.run("request().then(({ body }) => JSON.stringify(body))") != asked
    tab.click("#gallery .tile")
    tab.click("#shown-again")
    tab.until("document.activeElement.id === 'draw'")
    assert json.loads(tab.run("request().then(({ body }) => JSON.stringify(body))")) == json.loads(asked)
    again, _ = draw(tab)
    assert np.array_equal(again, found)
    unfold(tab)
    return own


def unfold(tab):
    """Open whatever is closed."""
    tab.run("for (const each of document.querySelectorAll('#ask details')) each.open = true")


def squares(folder, *places):
    """Pictures of a white square each, in memory and as files."""
    made = []
    for x, y in places:
        image = Image.new("RGB", (64, 64), (40, 20, 90))
        image.paste((255, 255, 255), (x, y, x + 24, y + 24))
        (folder / f"{x}-{y}.png").write_bytes(png(image))
        made.append((image, folder / f"{x}-{y}.png"))
    return made


def paint(tab, button):
    """A stroke from the middle to the right, by keyboard."""
    tab.run(f"document.querySelector({json.dumps(button)}).focus()")
    tab.press("Enter")
    tab.until("document.activeElement.id === 'paint-over'")
    tab.press(" ", *["ArrowRight"] * 9, " ")
    tab.click("#paint-done")
    tab.until("!document.querySelector('#paint').open")


def mask_in(tab, row, most=0):
    """What was painted over the first picture of a row, as `Request` takes it. most: the alpha of what is."""
    painted = pixels(tab, f"document.querySelector({json.dumps(row)}).held.pictures[0].mask.blob")[..., 3] <= most
    assert 20 < painted.sum() < painted.size / 2
    return Image.fromarray(painted.astype(np.uint8) * 255)


@real
@pytest.mark.slow
def test_guidance_and_schedules_in_all_detail(walked, bundle_of):
    tab, pipe = walked, diffoundry.load(bundle_of("pico"))
    fill(tab, prompt=PROMPT, seed=5, steps=8)
    put(tab, guidance_interval=(0.2, 0.8), guidance_rescale=0.7, guidance_mode="split", scheduler="euler")
    put(tab, scheduler_options='{"use_karras_sigmas": true}', denoising_end=0.9, rng="cuda", clip_skip=1)
    put(tab, weights=True, windows=True, tiled=True)
    guidance = Guidance(interval=(0.2, 0.8), rescale=0.7, mode="split")
    options = {"scheduler": "euler", "scheduler_options": {"use_karras_sigmas": True}, "denoising_end": 0.9}
    more = {"rng": "cuda", "clip_skip": 1, "weights": True, "windows": True, "tiled": True}
    own = drawn_again(tab, pipe, Request(PROMPT, seed=5, steps=8, guidance=guidance, **options, **more))
    assert own["guidance_interval"] == [0.2, 0.8] and own["scheduler_options"] == {"use_karras_sigmas": True}
    tab.click("#reset")
    fill(tab, seed=6)
    put(tab, scheduler="euler", timesteps="900, 600 300,100")
    assert not tab.run("isThere(document.querySelector('#steps')) || isThere(document.querySelector('#sigmas'))")
    own = drawn_again(tab, pipe, Request(PROMPT, seed=6, scheduler="euler", timesteps=(900, 600, 300, 100)))
    assert own["timesteps"] == [900, 600, 300, 100] and "steps" not in own
    put(tab, timesteps="", guidance_mode="off")
    assert tab.run("isThere(document.querySelector('#steps')) && isThere(document.querySelector('#guidance_mode'))")
    assert not tab.run("isThere(document.querySelector('#negative_prompt'))")


@real
@pytest.mark.slow
def test_embeddings_in_place_of_texts(walked, bundle_of, tmp_path):
    tab, pipe = walked, diffoundry.load(bundle_of("pico"))
    prompt, negative = pipe.encode([PROMPT, "a small ring"])[0]
    np.save(tmp_path / "prompt.npy", prompt.astype(np.float32))
    (tmp_path / "negative.json").write_text(json.dumps(negative.tolist()))
    np.save(tmp_path / "turned.npy", np.asfortranarray(prompt))
    (tmp_path / "none.json").write_text("{}")
    fill(tab, prompt="a", seed=5, steps=6)
    place = "[data-embeds={}] [type=file]".format
    (tmp_path / "short.npy").write_bytes((tmp_path / "prompt.npy").read_bytes()[:-4])
    (tmp_path / "shortest.npy").write_bytes((tmp_path / "prompt.npy").read_bytes()[:8])
    cases = {"none.json": "no embeddings", "turned.npy": "ascontiguousarray", "short.npy": "not whole"}
    for name, words in {**cases, "shortest.npy": "not whole"}.items():
        tab.choose(place("prompt_embeds"), tmp_path / name)
        tab.until(f"document.querySelector('#wrong').textContent.includes({json.dumps(words)})")
        assert tab.run("Boolean(document.querySelector('#wrong').closest('[data-embeds=prompt_embeds]'))")
        tab.run("wrong('')")
    tab.choose(place("prompt_embeds"), tmp_path / "prompt.npy")
    tab.until("state.embeds.size === 1 && !isThere(document.querySelector('#prompt'))")
    assert tab.run("document.querySelector('#wrong').hidden && !isThere(document.querySelector('#clip_skip'))")
    assert "prompt.npy (" in text(tab, "[data-embeds=prompt_embeds] .dim")
    tab.choose(place("negative_prompt_embeds"), tmp_path / "negative.json")
    tab.until("state.embeds.size === 2")
    wanted = Request(seed=5, steps=6, prompt_embeds=prompt, negative_prompt_embeds=negative)
    own = drawn_again(tab, pipe, wanted)
    assert "prompt" not in own and "prompt_embeds" not in own
    halves = np.array([1.5, -0.25, 6e-8, 65504], np.float16)
    np.save(tmp_path / "half.npy", halves)
    data = base64.b64encode((tmp_path / "half.npy").read_bytes()).decode()
    assert tab.run(f"embeddingIn(blobOf('{data}'))") == halves.astype(float).tolist()


@real
@pytest.mark.slow
def test_controls_and_pictures_beside_the_prompt_in_all_detail(walked, bundle_of, tmp_path):
    tab, pipe = walked, diffoundry.load(bundle_of("pico+control+union+image-plus"))
    choose_model(tab, "steered")
    (first, first_file), (second, second_file), (third, third_file) = squares(tmp_path, (4, 4), (36, 20), (12, 40))
    edge, union, plus = (f"[data-name={name}]" for name in ("edge", "union", "plus"))
    fill(tab, prompt=PROMPT, seed=5, steps=8)
    tab.choose(f"{edge} [type=file]", first_file)
    tab.until("rows().filter(isGiven).length === 1")
    put_in(tab, f"{edge} [data-part=scale] input", 0.6)
    put_in(tab, f"{edge} [data-part=interval] input", 0)
    put_in(tab, f"{edge} [data-part=interval] label + label input", 0.5)
    put_in(tab, f"{edge} [data-part=guess_mode] input", True)
    tab.choose(f"{union} [type=file]", second_file)
    tab.until("rows().filter(isGiven).length === 2")
    tab.click(f"{union} [data-do=another]")
    tab.choose(f"{union} + {union} [type=file]", third_file)
    tab.until("rows().filter(isGiven).length === 3")
    put_in(tab, f"{union} + {union} [data-part=mode] select", "canny")
    put_in(tab, f"{union} + {union} [data-part=scale] input", 0.4)
    for count, file in enumerate((first_file, second_file), 1):
        tab.choose(f"{plus} [data-part=image] input", file)
        tab.until(f"document.querySelectorAll('.shots li').length === {count}")
    put_in(tab, f"{plus} [data-part=scale] input", 0.7)
    put_in(tab, f"{plus} [data-part=interval] input", 0.25)
    tab.choose(f"{plus} [data-part=negative] [type=file]", third_file)
    tab.until("!document.querySelector('[data-do=remove-negative]').hidden")
    paint(tab, f"{plus} .shots [data-do=mask]")
    assert tab.run("document.activeElement.dataset.do") == "mask"
    mode = tab.run(f"document.querySelector({json.dumps(union)}).querySelector('select').value")
    wanted = Request(
        PROMPT,
        seed=5,
        steps=8,
        control=(
            Control("edge", first, 0.6, (0, 0.5), guess_mode=True),
            Control("union", second, mode=mode),
            Control("union", third, 0.4, mode="canny"),
        ),
        image_prompt=(
            ImagePrompt(
                "plus",
                [first, second],
                0.7,
                (0.25, 1),
                mask=[mask_in(tab, plus, 127), Image.new("L", (64, 64), 255)],
                negative=third,
            ),
        ),
    )
    own = drawn_again(tab, pipe, wanted)
    assert own["control"][0] == {"name": "edge", "scale": 0.6, "interval": [0, 0.5], "guess_mode": True}
    assert own["image_prompt"] == [{"name": "plus", "scale": 0.7, "interval": [0.25, 1]}]
    layers = tab.run("can().attentions.plus")
    scales = [round(0.1 * (i % 5), 1) for i in range(layers)]
    tab.click(f"{plus} .shots li:last-child [data-do=remove]")
    put_in(tab, f"{plus} [data-part=scales] input", " ".join(map(str, scales)))
    tab.click(f"{edge} [data-do=remove]")
    tab.click(f"{union} + {union} [data-do=remove]")
    tab.click(f"{union} [data-do=remove]")
    tab.click("[data-do=remove-negative]")
    with expected(tab, "400"):
        put_in(tab, f"{plus} [data-part=scales] input", "1, 2")
        tab.click("#draw")
        tab.until("document.querySelector('#wrong').textContent.includes('found 2 scales')")
    assert tab.run("document.activeElement.parentElement.dataset.part") == "scales"
    put_in(tab, f"{plus} [data-part=scales] input", " ".join(map(str, scales)))
    image_prompt = ImagePrompt("plus", [first], tuple(scales), (0.25, 1), mask=[mask_in(tab, plus, 127)])
    own = drawn_again(tab, pipe, Request(PROMPT, seed=5, steps=8, image_prompt=(image_prompt,)))
    assert own["image_prompt"][0]["scale"] == scales and "control" not in own
    choose_model(tab, "face")
    unfold(tab)
    assert not tab.run("isThere(document.querySelector('[data-name=face] [data-do=pick]'))")
    pipe = diffoundry.load(bundle_of("pico+image-face"))
    shape = pipe.bundle.component(pipe.bundle.manifest.wiring.image_prompts["face"].component).inputs[0].shape[1:]
    embeds = np.random.default_rng(3).standard_normal((2, *map(int, shape))).astype(np.float32)
    np.save(tmp_path / "face.npy", embeds)
    tab.choose("[data-name=face] [data-part=embeds] [type=file]", tmp_path / "face.npy")
    tab.until("rows().filter(isGiven).length === 1")
    fill(tab, seed=5, steps=8)
    drawn_again(tab, pipe, Request(PROMPT, seed=5, steps=8, image_prompt=(ImagePrompt("face", embeds=embeds),)))


@real
@pytest.mark.slow
def test_what_is_drawn_from_outlives_the_page(walked, tmp_path):
    """A page that is loaded again knows the pictures of a job; a model that lacks a setting says so."""
    tab = walked
    choose_model(tab, "steered")
    [(_, file)] = squares(tmp_path, (4, 4))
    fill(tab, prompt=PROMPT, seed=5, steps=300)
    put(tab, guidance_interval=(0, 0.5))
    tab.choose("[data-name=edge] [type=file]", file)
    tab.until("rows().filter(isGiven).length === 1")
    tab.click("#draw")
    tab.until("document.querySelector('.job progress')?.value > 0")
    tab.reload()
    tab.until("gallery.all.length && document.querySelector('.job.ended .tile:not(:disabled)')")
    assert tab.run("drawnFrom('readonly', (store) => store.count())") == 0
    tab.click("#gallery .tile")
    assert "edge 1" in text(tab, "#shown-settings") and "Guidance interval0, 0.5" in text(tab, "#shown-settings")
    tab.click("#shown-again")
    tab.until("rows().filter(isGiven).length === 1 && document.querySelector('#guidance_interval').value === '0'")
    assert tab.run("document.querySelector('#wrong').hidden")
    own = tab.run("gallery.all[0].settings")
    old = "{ ...gallery.all[0], given: { control: { edge: gallery.all[0].given.control[0].pictures[0] } } }"
    tab.run(f"use({old}, true)")  # as it was kept before a control could have several pictures
    assert tab.run("request().then(({ body }) => plain(body))") == own
    tab.run("state.models.splice(1, 1); undefined")  # the server has it no more
    tab.run("document.querySelector('#model').value = 'pico'; chooseModel(); use(gallery.all[0], true)")
    assert text(tab, "#wrong") == "Not filled in, for pico has no such setting: Controls."
    assert tab.run("settings().guidance_interval") == [0, 0.5]


@real
@pytest.mark.slow
def test_pictures_to_start_from_and_the_tiny_decoder_in_all_detail(walked, bundle_of, tmp_path):
    tab, pipe = walked, diffoundry.load(bundle_of("pico"))
    [(image, file)] = squares(tmp_path, (20, 20))
    tab.choose("#source-file", file)
    tab.until("state.source")
    fill(tab, prompt=PROMPT, seed=5, steps=8)
    assert tab.run("isThere(document.querySelector('#strength')) && !isThere(document.querySelector('#decoder'))")
    put(tab, denoising_start=0.3, resize="crop")
    assert not tab.run("isThere(document.querySelector('#strength'))")
    wanted = Request(PROMPT, seed=5, steps=8, image=image, denoising_start=0.3, resize="crop")
    drawn_again(tab, pipe, wanted)
    tab.run("can().decoders.push('tiny'); refresh()")
    put(tab, decoder="tiny")
    refused_at(tab, "decoder", "has no tiny decoder")


@real
@pytest.mark.slow
def test_what_models_of_flow_matching_have(walked, bundle_of, tmp_path):
    tab, pipe = walked, diffoundry.load(bundle_of(FLOW))
    can = pipe.abilities()
    assert (can["layers"], can["masked_controls"], can["guess_modes"]) == (3, ["inpaint"], [])
    assert can["regions"] == [] and list(can["attentions"]) == ["look"]
    choose_model(tab, "flow")
    [(image, file), (other, other_file)] = squares(tmp_path, (20, 20), (4, 30))
    fill(tab, prompt=PROMPT, prompt_2="a star", prompt_3="a red star", negative_prompt="b", seed=5, steps=6)
    put(tab, negative_prompt_2="c", negative_prompt_3="d", max_sequence_length=40)
    assert not tab.run("isThere(document.querySelector('#skip_layer_guidance_scale'))")
    put(tab, skip_guidance_layers="0,2")
    put(tab, skip_layer_guidance_scale=1.5, skip_layer_guidance_start=0, skip_layer_guidance_stop=0.9)
    skipping = {"skip_layer_guidance_scale": 1.5, "skip_layer_guidance_start": 0, "skip_layer_guidance_stop": 0.9}
    texts = {"prompt_2": "a star", "prompt_3": "a red star", "negative_prompt": "b", "negative_prompt_2": "c"}
    texts |= {"negative_prompt_3": "d", "max_sequence_length": 40}
    wanted = Request(PROMPT, seed=5, steps=6, guidance=Guidance(skip_guidance_layers=(0, 2), **skipping), **texts)
    own = drawn_again(tab, pipe, wanted)
    assert own["skip_guidance_layers"] == [0, 2]
    put(tab, skip_guidance_layers="1, 7")
    refused_at(tab, "skip_guidance_layers", "must be from 0 to 2")
    assert tab.run("document.querySelector('#wrong').previousElementSibling.querySelector('input').id") == (
        "skip_guidance_layers"
    )
    put(tab, skip_guidance_layers="one")
    tab.click("#draw")
    tab.until("document.querySelector('#wrong').textContent.endsWith('whole numbers, such as 7, 8, 9.')")
    tab.click("#reset")
    tab.choose("[data-name=inpaint] [type=file]", file)
    tab.until("rows().filter(isGiven).length === 1")
    fill(tab, seed=5, steps=6)
    tab.click("#draw")
    tab.until("document.querySelector('#wrong').textContent.startsWith('inpaint needs a mask')")
    assert tab.run("document.querySelector('#wrong').closest('.drop').dataset.name") == "inpaint"
    paint(tab, "[data-name=inpaint] [data-do=mask]")
    control = Control("inpaint", image, mask=mask_in(tab, "[data-name=inpaint]"))
    drawn_again(tab, pipe, Request(PROMPT, seed=5, steps=6, control=(control,)))
    tab.click("[data-name=inpaint] [data-do=remove]")
    tab.choose("[data-name=look] [data-part=image] input", other_file)
    tab.until("rows().filter(isGiven).length === 1")
    assert not tab.run("isThere(document.querySelector('.shots [data-do=mask]'))")
    drawn_again(tab, pipe, Request(PROMPT, seed=5, steps=6, image_prompt=(ImagePrompt("look", other),)))


@real
@pytest.mark.slow
def test_what_other_models_have(walked, bundle_of, checkpoint_of):
    tab = walked
    choose_model(tab, "sdxl")
    fill(tab, prompt=PROMPT, prompt_2="a star", negative_prompt="b", seed=5, steps=4)
    put(tab, negative_prompt_2="c")
    put_in(tab, "[data-field='conditioning.original_size'][data-at='1']", 96)
    tab.click("#draw")
    tab.until("document.querySelector('#wrong').textContent.startsWith('Height of original size must be a number')")
    put_in(tab, "[data-field='conditioning.original_size'][data-at='0']", 128)
    for name, numbers in (("conditioning.crop", (8, 16)), ("negative_conditioning.target_size", (32, 48))):
        for at, number in enumerate(numbers):
            put_in(tab, f"[data-field='{name}'][data-at='{at}']", number)
    told = {
        "conditioning": Conditioning(original_size=(128, 96), crop=(8, 16)),
        "negative_conditioning": Conditioning(target_size=(32, 48)),
    }
    texts = {"prompt_2": "a star", "negative_prompt": "b", "negative_prompt_2": "c"}
    drawn_again(tab, diffoundry.load(bundle_of("sdxl-small")), Request(PROMPT, seed=5, steps=4, **texts, **told))
    choose_model(tab, "flux")
    fill(tab, seed=5, steps=4)
    put(tab, true_cfg_scale=2.5)
    put(tab, negative_prompt="b")
    wanted = Request(PROMPT, negative_prompt="b", seed=5, steps=4, guidance=Guidance(true_cfg_scale=2.5))
    drawn_again(tab, diffoundry.load(bundle_of("flux-dev-small")), wanted)
    choose_model(tab, "lora")
    fill(tab, negative_prompt="", seed=5, steps=6)
    put_in(tab, "#loras [data-part=strength]", 0.8)
    put_in(tab, "#loras [data-part=text_strength]", 0.3)
    lora = Lora(checkpoint_of("pico+lora-peft"), 0.8, 0.3)
    own = drawn_again(tab, diffoundry.load(bundle_of("pico+lora")), Request(PROMPT, seed=5, steps=6, loras=(lora,)))
    assert own["loras"] == [{"name": "style", "strength": 0.8, "text_strength": 0.3}]
