"""Folders that lead out of themselves: nothing outside is read, written or removed, whatever is asked of them.

What is outside is the very content that belongs in the bundle, so that a command that follows the link would succeed.
That nothing is read there shows in the times of last access, which the file system keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError, DiffoundryError
from diffoundry.common.files import mark
from diffoundry.engines import EngineStore
from diffoundry.families import open_bundle
from diffoundry.runtime.pipeline import Request, load

KEY = "*"
"""Stands for the key of an engine of the bundle."""
PLACES = (
    "bundle.json",
    "model_index.json",
    "scheduler",
    "scheduler/scheduler_config.json",
    "tokenizer",
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder",
    "text_encoder/model.onnx",
    "unet",
    "unet/config.json",
    "unet/model.onnx",
    "unet/fused.onnx",
    "unet/per_prompt.onnx",
    "vae_decoder/fused.onnx",
    "step",
    "step/model.onnx",
    "reports",
    "reports/parity.json",
    "reports/quality.json",
    "reports/stages",
    "reports/stages/unet.json",
    "reports/reference",
    "reports/reference/unet.npz",
    "engines",
    f"engines/{KEY}",
    f"engines/{KEY}/engine.json",
    f"engines/{KEY}/model.onnx",
    "engines/.0123456789abcdef0123456789abcdef-01234567",
)
FOREIGN = (
    "model_index.json",
    "scheduler",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "unet",
    "unet/model.onnx",
    "unet/config.json",
    "vae_decoder/config.json",
    "vae_decoder/model.onnx",
)


def absolute(place: Path, there: Path) -> None:
    place.symlink_to(there)


def relative(place: Path, there: Path) -> None:
    place.symlink_to(os.path.relpath(there, place.parent))


def chained(place: Path, there: Path) -> None:
    """A link to a link that lies in the bundle and leads out."""
    between = place.parent / "between"
    between.symlink_to(there)
    place.symlink_to("between")


def nested(place: Path, there: Path) -> None:
    """A folder of its own, in which everything is a link."""
    if there.is_dir():
        place.mkdir()
        for each in there.iterdir():
            (place / each.name).symlink_to(each)
    else:
        place.symlink_to(there.parent / "." / there.name)


def dangling(place: Path, there: Path) -> None:
    place.symlink_to(there.parent / "not-there")


def loop(place: Path, there: Path) -> None:
    place.symlink_to(place.name)


def pipe(place: Path, there: Path) -> None:
    os.mkfifo(place)


def device(place: Path, there: Path) -> None:
    place.symlink_to("/dev/zero")


def plug(place: Path, there: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(place.parent)  # the name of a socket is short
        try:
            made.bind(place.name)
        finally:
            os.chdir(here)


KINDS = (absolute, relative, chained, nested, dangling, loop, pipe, device, plug)


def as_export(bundle: Path) -> Path:
    """The bundle as a folder of another tool: without what only we write."""
    for name in ("step", "engines", "reports"):
        shutil.rmtree(bundle / name)
    for path in (bundle / "bundle.json", *bundle.glob("*/fused.onnx"), *bundle.glob("*/per_prompt.onnx")):
        path.unlink()
    return bundle


class Outside:
    """A folder whose names, contents and times are to stay, down to the time of the last access."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def known(self) -> list[Path]:
        return [self.root, *sorted(self.root.rglob("*"))]

    def freeze(self) -> None:
        """Take everything down; an access time before that of the change is one that the next access changes."""
        self._known = self.known()
        for path in self._known:
            os.utime(path, ns=(1, path.stat().st_mtime_ns))
        self._before = [self._state(path) for path in self._known]

    def check(self) -> None:
        after = [self._state(path) for path in self._known]
        assert after == self._before
        assert self.known() == self._known
        self.freeze()  # looking was an access too

    @staticmethod
    def _state(path: Path) -> tuple[int, ...]:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mode, found.st_nlink, found.st_mtime_ns, found.st_atime_ns


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    """Empty at first."""
    made = Outside(tmp_path / "outside")
    (made.root / "probe").write_text("x")
    made.freeze()
    (made.root / "probe").read_text()
    with pytest.raises(AssertionError):  # this file system keeps the times of access
        made.check()
    (made.root / "probe").unlink()
    return made


def linked_copy(bundle: Path, to: Path) -> Path:
    """A copy by links, with an engine in it."""
    copy = Path(shutil.copytree(bundle, to, copy_function=os.link))
    keep_engine(copy, "unet")
    return copy


def keep_engine(bundle: Path, component: str) -> None:
    """Keep what stands for a built engine, by the store's own ways."""
    store, built_from = EngineStore(bundle / "engines"), {"component": component, "version": "1"}
    with store.building(store.key(built_from), built_from) as work:
        (work / "model.onnx").write_bytes(b"an engine")


def plant(bundle: Path, place: str, kind: Callable[[Path, Path], None], outside: Outside) -> None:
    """Put what stands at `place` of the bundle outside, and a `kind` of link to it in its stead."""
    if KEY in place:
        place = next(bundle.glob(place)).relative_to(bundle).as_posix()
    here, there = bundle / place, outside.root / "there"
    if here.exists():
        shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
        shutil.rmtree(here) if here.is_dir() else here.unlink()
    else:
        there.mkdir()
        (there / "model.onnx").write_text("mine")
    old = time.time() - 7 * 3600
    (outside.root / ".ssh").mkdir()
    (outside.root / ".ssh" / "key").write_text("a key")
    for path in (there, outside.root / ".ssh"):
        os.utime(path, (old, old))
    kind(here, there)
    outside.freeze()


def refused(done: Any) -> None:
    assert done.returncode == 1, (done.args, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr


def attack(called, bundle: Path, outside: Outside, tmp_path: Path, checkpoint: Path | None) -> None:
    commands: list[tuple[object, ...]] = [
        ("run", bundle, "a ring", "--steps", 1, "--width", 32, "--height", 32, "-o", tmp_path / "o.png"),
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
        ("verify", bundle),
        ("schedulers", "euler", "--bundle", bundle),
    ]
    if checkpoint is not None:
        commands.append(("compile", checkpoint, "-o", bundle))
    for command in commands:
        refused(called(*command))
        outside.check()
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("bundle.json", absolute),
        ("engines", relative),
        (f"engines/{KEY}", nested),
        (f"engines/{KEY}/engine.json", pipe),
        ("reports", chained),
        ("scheduler/scheduler_config.json", device),
        ("unet/model.onnx", loop),
        ("bundle.json", dangling),
        ("tokenizer", absolute),
        ("reports/parity.json", plug),
    ],
)
def test_nothing_outside_a_bundle_is_touched(called, bundle_of, outside, tmp_path, place, kind):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    plant(bundle, place, kind, outside)
    attack(called, bundle, outside, tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_nothing_outside_a_bundle_is_touched_by_any_command(called, bundle_of, checkpoint_of, outside, tmp_path, place):
    for i, kind in enumerate(KINDS):
        bundle = linked_copy(bundle_of("pico"), tmp_path / f"b{i}")
        own = Outside(outside.root / str(i))
        plant(bundle, place, kind, own)
        attack(called, bundle, own, tmp_path, checkpoint_of("pico"))


@pytest.mark.parametrize(
    "place", [*FOREIGN[:1], FOREIGN[7], *(pytest.param(p, marks=pytest.mark.slow) for p in FOREIGN[1:7] + FOREIGN[8:])]
)
def test_nothing_outside_a_folder_without_a_manifest_is_touched(called, bundle_of, outside, tmp_path, place):
    for i, kind in enumerate((absolute, nested, pipe, chained)):
        folder = as_export(linked_copy(bundle_of("pico"), tmp_path / f"b{i}"))
        own = Outside(outside.root / str(i))
        plant(folder, place, kind, own)
        attack(called, folder, own, tmp_path, None)


def test_the_remedies_for_a_link_work(called, bundle_of, outside, tmp_path, command):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    plant(bundle, "unet/model.onnx", absolute, outside)
    done = called("inspect", bundle)
    refused(done)
    assert "unet/model.onnx" in done.stderr and "cp -rL" in done.stderr
    assert os.system(f"cp -rL {bundle} {tmp_path / 'copy'}") == 0
    Bundle.open(tmp_path / "copy").check()
    (bundle / "unet/model.onnx").unlink()
    shutil.copy(outside.root / "there", bundle / "unet/model.onnx")
    (bundle / "inner").symlink_to("unet")  # a link within is no harm
    Bundle.open(bundle).check()


def test_a_link_within_the_bundle_does_not_make_engines_of_another_folder(bundle_of, tmp_path):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    shutil.rmtree(bundle / "engines")
    (bundle / "engines").symlink_to("unet")
    with pytest.raises(BundleError, match="engines are written there: remove the link"):
        Bundle.open(bundle)
    (bundle / "engines").unlink()
    Bundle.open(bundle)


# --- the cache of the Hugging Face hub -------------------------------------------------------------------------------


def in_hub_cache(bundle: Path, cache: Path, *, shared: bool = False) -> Path:
    """The bundle as huggingface_hub lays out what it downloads: its own functions make the links."""
    from huggingface_hub.file_download import _create_symlink
    from huggingface_hub.utils._shared_blobs import SHARED_BLOBS_MARKER_NAME, shared_blob_path

    repository = cache / "models--me--pico"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    if shared:
        (cache / "blobs").mkdir()
        (cache / "blobs" / SHARED_BLOBS_MARKER_NAME).write_text("1\n")
    for path in sorted(bundle.rglob("*")):
        if path.is_file() and "engines" not in path.parts:
            name = hashlib.sha256(path.read_bytes()).hexdigest()
            blob = repository / "blobs" / name
            if not blob.exists() and shared:
                stored = shared_blob_path(cache, name)
                stored.parent.mkdir(exist_ok=True)
                shutil.copy(path, stored)
                _create_symlink(str(stored), str(blob))
            elif not blob.exists():
                shutil.copy(path, blob)
            pointer = snapshot / path.relative_to(bundle)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(pointer))
    return snapshot


@pytest.mark.parametrize("one_store", [False, True])
def test_a_bundle_in_the_cache_of_the_hub_runs(called, bundle_of, tmp_path, one_store):
    snapshot = in_hub_cache(bundle_of("pico"), tmp_path / "hub", shared=one_store)
    assert (snapshot / "unet/model.onnx").is_symlink()
    blobs = Outside.__new__(Outside)
    blobs.root = snapshot.parents[1] / "blobs"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in blobs.known()[1:]}
    drawn, expected = (
        load(root, threads=1)("a star", steps=1, width=32, height=32, seed=1).images[0]
        for root in (snapshot, bundle_of("pico"))
    )
    assert drawn.tobytes() == expected.tobytes()
    assert called("inspect", snapshot).returncode == 0
    assert called("verify", snapshot, "--threads", 1).returncode == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in blobs.known()[1:]} == before
    assert not (snapshot / "engines").exists()


@pytest.mark.parametrize(
    "there",
    [
        "models--me--pico/secret",
        "models--other--one/blobs/secret",
        "models--me--pico/blobs/folder/secret",
        "blobs/secret",
        f"blobs/ab/ab{'0' * 62}",  # of a shared store that is none: it has no mark
    ],
)
def test_only_the_files_of_its_own_in_the_cache_are_read(bundle_of, tmp_path, there):
    snapshot = in_hub_cache(bundle_of("pico"), tmp_path / "hub")
    secret = tmp_path / "hub" / there
    secret.parent.mkdir(parents=True, exist_ok=True)
    path = snapshot / "unet/model.onnx"
    shutil.copy(path, secret)
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(BundleError, match="through a link"):
        Bundle.open(snapshot)


def test_engines_that_came_from_the_hub_are_used_and_swept_as_links(bundle_of, tmp_path):
    """Uploaded with the bundle: whole ones run, damaged ones go without what they lead to."""
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    for component in ("text_encoder", "vae_decoder", "vae_encoder"):
        keep_engine(bundle, component)
    snapshot = in_hub_cache(bundle, tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    for folder in sorted((bundle / "engines").iterdir()):
        (snapshot / "engines" / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copy(path, blobs / f"{folder.name}{path.name}")
            (snapshot / "engines" / folder.name / path.name).symlink_to(blobs / f"{folder.name}{path.name}")
    store = EngineStore(snapshot / "engines")
    keys = [record["key"] for record in store.records()]
    assert len(keys) > 3 and Bundle.open(snapshot)
    assert all(store.find(key) for key in keys)
    damaged = blobs / f"{keys[0]}model.onnx"
    damaged.write_bytes(b"damaged")
    assert store.find(keys[0]) is None and damaged.read_bytes() == b"damaged"
    assert not (store.root / keys[0]).exists()


def test_in_the_cache_of_the_hub_engines_are_no_link_either(bundle_of, tmp_path):
    snapshot = in_hub_cache(bundle_of("pico"), tmp_path / "hub")
    (snapshot / "engines").symlink_to(tmp_path / "hub/models--me--pico/blobs")
    with pytest.raises(BundleError, match="through a link"):
        Bundle.open(snapshot)


# --- a bundle that lost its manifest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["step", "engines", "reports", "unet/fused.onnx"])
def test_a_bundle_that_lost_its_manifest_is_not_run_as_another_tools_folder(called, bundle_of, tmp_path, left):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    kept = as_export(linked_copy(bundle_of("pico"), tmp_path / "c"))
    assert open_bundle(kept).foreign
    shutil.copytree(bundle / left, kept / left) if (bundle / left).is_dir() else shutil.copy(bundle / left, kept / left)
    done = called("run", kept, "a ring", "-o", tmp_path / "o.png")
    refused(done)
    assert "has lost its bundle.json" in done.stderr
    assert not (tmp_path / "o.png").exists()
    shutil.rmtree(kept)  # the remedy: the whole of it again
    Bundle.open(shutil.copytree(bundle, kept)).check()


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_only_what_builds_left_is_swept(tmp_path):
    store, old = EngineStore(tmp_path / "engines"), time.time() - 7 * 3600
    mine = [f".{'a' * 32}-01234567", ".ssh", ".config", "notes", "b" * 31]
    left, young = f".{'b' * 32}-01234567", f".{'c' * 32}-01234567"
    for name in (*mine, left, young):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "x").write_text("x")
    (store.root / ".link").symlink_to(tmp_path)
    for name in (left, young):
        mark(store.root / name)
    for path in store.root.iterdir():
        if path.name != young and not path.is_symlink():
            os.utime(path, (old, old))
    with store.building("d" * 32, {}) as work:
        (work / "model.onnx").write_text("x")
    assert {path.name for path in store.root.iterdir()} == {*mine, ".link", young, "d" * 32}
    store.prune([])
    assert {path.name for path in store.root.iterdir()} == {*mine, ".link"}
    assert all((store.root / name / "x").exists() for name in mine)


def test_a_store_that_is_a_link_is_not_swept(outside, tmp_path):
    (outside.root / ("a" * 32)).mkdir()
    (outside.root / ("a" * 32) / "engine.json").write_text("{}")
    outside.freeze()
    (tmp_path / "engines").symlink_to(outside.root)
    store = EngineStore(tmp_path / "engines")
    store.drop("a" * 32)
    store.prune([])
    outside.check()


# --- manifests -------------------------------------------------------------------------------------------------------

VALUES = (
    *(None, True, -1, 0, 1, 10**9, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "x", "x" * 5000, "../x", "/x"),
    *(
        "a\0b",
        "\ud800",
        "\x1b[2J",
        "unet",
        "unet/model.onnx",
        "0" * 64,
        [],
        {},
        [[]],
        {"": {}},
        ["x", 1],
        [None] * 1000,
    ),
)


def mutated(manifest: dict[str, Any], rng: random.Random) -> str:
    """The manifest with one to three changes: values, names, lists and text."""
    value = json.loads(json.dumps(manifest))
    for _ in range(rng.randint(1, 3)):
        part: Any = value
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = rng.choice(keys)
            if not isinstance(part[key], (dict, list)) or not part[key] or rng.random() < 0.25:
                break
            part = part[key]
        how = rng.choice(("value", "value", "value", "delete", "name", "number", "twice", "deep"))
        if how == "delete" and len(keys) > 1:
            del part[key]
        elif how == "name" and isinstance(part, dict):
            part[rng.choice(("", "x", "../x", "unet", "a\0b", "\ud800", "x" * 3000))] = part.pop(key)
        elif how == "number" and isinstance(part[key], (int, float)):
            part[key] = part[key] * rng.choice((-1, 2, 1.5, 10**6, 1e-9))
        elif how == "twice" and isinstance(part, list):
            part.append(part[key])
        elif how == "deep":
            for _ in range(rng.choice((10, 90, 300))):
                part[key] = [part[key]] if rng.random() < 0.5 else {"x": part[key]}
        else:
            part[key] = rng.choice(VALUES)
        if not value:
            break
    text = json.dumps(value)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = rng.choice((text[:at], text[:at] + rng.choice('{}[]",:\\0e-') + text[at + 1 :], text[at:]))
    return text


def mutate(called, bundle: Path, seeds: range) -> None:
    """Every command that only reads gives an answer or one line for each of the manifests."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    path.unlink()  # it is linked to the bundle that others use
    opened = 0
    for seed in seeds:
        path.write_text(mutated(manifest, random.Random(seed)), encoding="utf-8", errors="surrogatepass")
        for command in (("inspect",), ("inspect", "--json")):
            done = called(command[0], bundle, *command[1:])
            if done.returncode:
                refused(done)
            else:
                assert not done.stderr, (seed, done.stderr)
        with contextlib.suppress(DiffoundryError):
            load(bundle, threads=1).check(Request("a ring", steps=2, seed=1))
            opened += 1
    assert 0 < opened < len(seeds)


def test_mutated_manifests_are_answered_in_one_line(called, bundle_of, tmp_path):
    mutate(called, linked_copy(bundle_of("pico"), tmp_path / "b"), range(60))


@pytest.mark.slow
def test_two_thousand_mutated_manifests_are_answered_in_one_line(called, bundle_of, tmp_path):
    mutate(called, linked_copy(bundle_of("pico"), tmp_path / "b"), range(2000))


def at(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    """What puts a value there."""

    def put(manifest: dict[str, Any], value: Any) -> None:
        part: Any = manifest
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value

    return put


def swapped(one: str, other: str) -> Callable[[dict[str, Any], Any], None]:
    """What gives each of two inputs of the denoiser what feeds the other."""

    def swap(manifest: dict[str, Any], _: Any) -> None:
        inputs = manifest["wiring"]["inputs"]
        inputs[one], inputs[other] = inputs[other], inputs[one]

    return swap


def as_input(source: str, *shape: Any) -> Callable[[dict[str, Any], Any], None]:
    """What gives the denoiser another input, which `source` feeds."""

    def add(manifest: dict[str, Any], _: Any) -> None:
        manifest["components"]["transformer"]["inputs"].append({"name": "own", "dtype": "float32", "shape": shape})
        manifest["wiring"]["inputs"]["own"] = source

    return add


@pytest.mark.parametrize(
    ("change", "value", "told"),
    [
        (at("tokenizers", "tokenizer", "bos_token_id"), None, "tokenizers.tokenizer must have a bos_token_id"),
        (at("tokenizers", "tokenizer", "eos_token_id"), None, "tokenizers.tokenizer must have a bos_token_id and an"),
        (at("tokenizers", "tokenizer_2", "before"), "x" * (1 << 20), "tokenizer_2.before must be 4096 characters"),
        (at("tokenizers", "tokenizer_2", "after"), "x" * 4097, "tokenizer_2.after must be 4096 characters"),
        (at("wiring", "flow", "patch"), 10**9, "wiring.flow.patch must be from 1 to 64"),
        (at("wiring", "text"), [{"bucket": 32, "length": 0}], "must be a multiple of its bucket"),
        (at("wiring", "text"), [{"bucket": 32, "length": 500}], "must be a multiple of its bucket"),
        (at("latents", "multiple"), 0, "latents.multiple must be from 1 to 64, found 0"),
        (at("latents", "multiple"), "16", "latents.multiple must be a whole number, found '16'"),
        (at("latents", "multiple"), 10**9, "latents.multiple must be from 1 to 64, found 1000000000"),
        (at("latents", "multiple"), 7, r"it draws \d+x\d+ pixels by default, where sides are multiples of 56 up to"),
        (at("latents", "downscale"), 10**9, "latents.downscale must be from 1 to 256, found 1000000000"),
        (swapped("pooled_projections", "guidance"), None, "pooled_projections of the denoiser has 2 axes"),
        (as_input("text.mask", "batch_size", "sequence_length", 4), None, "input own of the denoiser has 3 axes"),
        (as_input("text.pooled", "batch_size", 40), None, "own of the denoiser takes 40 numbers, text.pooled feeds"),
        (as_input("text.hidden", "batch_size", "n", 40), None, "own of the denoiser takes 40 numbers, text.hidden"),
        (as_input("sizes", "batch_size", 32), None, "own of the denoiser takes 32 numbers, sizes feeds it 6"),
        (as_input("latents", "batch_size", 4, "height", "width"), None, "own of the denoiser takes 4 numbers"),
        (as_input("picture", "batch_size", 16, "height", "width"), None, "which are not those of picture"),
        (as_input("latents", "b", 16, "picture_height", "picture_width"), None, "which are not those of latents"),
    ],
)
def test_a_wiring_that_cannot_be_is_answered_in_one_line(called, bundle_of, tmp_path, change, value, told):
    bundle = Path(shutil.copytree(bundle_of("flux-dev-small"), tmp_path / "b", copy_function=os.link))
    manifest = json.loads((bundle / "bundle.json").read_text())
    if told.startswith("must be a multiple"):
        value = [{**manifest["wiring"]["text"][1], **each} for each in value]
    change(manifest, value)
    (bundle / "bundle.json").unlink()  # it is linked to the bundle that others use
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=told) as raised:
        load(bundle)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert str(raised.value).endswith("compile the bundle again")


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_json_that_is_nested_too_deep_is_one_line(called, bundle_of, tmp_path, depth):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    path = next(bundle.glob("engines/*/engine.json"))
    record = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**record, "version": 0})[:-2] + "[" * depth + "]" * depth + "}")
    assert called("inspect", bundle, "--json").returncode == 0  # an engine whose record is damaged is none
    (bundle / "bundle.json").unlink()
    (bundle / "bundle.json").write_text('{"schema_version": 1, "x": ' + "[" * depth + "]" * depth + "}")
    done = called("inspect", bundle)
    refused(done)
    assert "nested more than 64 levels deep" in done.stderr


def test_json_of_more_than_the_limit_is_not_read(called, bundle_of, tmp_path):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    (bundle / "bundle.json").unlink()
    with (bundle / "bundle.json").open("wb") as file:
        file.truncate(40 << 30)  # no disk is taken; it could not be read into memory
    done = called("inspect", bundle)
    refused(done)
    assert "at most 67 MB are read" in done.stderr


# --- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "vae/diffusion_pytorch_model.bin", "x"]
)
@pytest.mark.parametrize("kind", [pipe, plug, device])
def test_what_is_no_file_in_a_checkpoint_is_refused_before_the_work(called, checkpoint_of, tmp_path, place, kind):
    checkpoint = Path(shutil.copytree(checkpoint_of("pico"), tmp_path / "c"))
    (checkpoint / place).unlink(missing_ok=True)
    kind(checkpoint / place, checkpoint)
    done = called("compile", checkpoint, "-o", tmp_path / "b")
    refused(done)
    assert place in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_socket_of_git_is_no_harm(bundle_of, tmp_path):
    bundle = linked_copy(bundle_of("pico"), tmp_path / "b")
    (bundle / ".git").mkdir()
    plug(bundle / ".git" / "fsmonitor--daemon.ipc", bundle)
    Bundle.open(bundle).check()


def test_a_picture_is_not_written_through_a_link(outside, tmp_path):
    from PIL import Image

    from diffoundry.runtime.pictures.images import save_png

    (outside.root / "mine.png").write_text("mine")
    outside.freeze()
    for name in ("o.png", f".o.png.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(outside.root / "mine.png")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "o.png", {"seed": 1})
    outside.check()
    assert json.loads(Image.open(tmp_path / "o.png").text["diffoundry"]) == {"seed": 1}
    assert not (tmp_path / "o.png").is_symlink()
