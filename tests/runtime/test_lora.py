"""LoRAs: three ways to the same picture, rows with sets of their own, names that trainers use, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

import diffoundry
from diffoundry import Lora, Request
from diffoundry.bundle import FULL, STANDARD, Bundle
from diffoundry.bundle.reports import read_report
from diffoundry.calibration.build import build
from diffoundry.common.errors import BundleError, DiffoundryError, EngineError, LoraError, RequestError
from diffoundry.engines.changed import new_values, sources_of
from diffoundry.engines.initializers import read_initializers
from diffoundry.engines.lora_denoiser import LoraDenoiser
from diffoundry.engines.verify import verify
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.lora import Fused, fuse
from diffoundry.families.lora import LoraFile
from diffoundry.families.lora.pickles import read_pickle
from diffoundry.parity.pipelines import ADAPTED, LORA
from diffoundry.runtime.lora import weights_of
from diffoundry.runtime.lora_sets import LoraSets

NEAR = 1e-5
ASKED = {"steps": 4, "guidance": 3.0, "width": 64, "height": 64, "output": "latent"}
CHECKPOINT, PROMPT = "pico", "a large red star at the left on a navy background"
OTHER = "a small white ring at the top on a black background"


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of(CHECKPOINT + ADAPTED)


@pytest.fixture(scope="module")
def files(checkpoint_of):
    return {kind: checkpoint_of(f"{CHECKPOINT}{LORA}{kind}") for kind in ("peft", "kohya", "dora")}


@pytest.fixture
def pipe(bundle):
    return diffoundry.load(bundle, engine="onnxruntime")


@pytest.fixture(scope="module")
def weights(bundle):
    return weights_of(Bundle.open(bundle))


def drawn(pipe, seed=3, prompt=PROMPT, **options):
    return pipe(prompt, seed=seed, **{**ASKED, **options}).latents


def written(path, tensors, **metadata):
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, path, metadata or None
    )
    return path


def test_weights_at_compile_are_those_at_run(bundle, files, checkpoint_of, tmp_path):
    loras, opened = (Lora(files["peft"], 0.6), Lora(files["kohya"], -0.3, 0.2)), Bundle.open(bundle)
    source = Checkpoint.open(checkpoint_of(CHECKPOINT))
    made = fuse(source, Fused(loras), "unet", {"text_encoder": "tokenizer"}, tmp_path, keep_half=False)
    assert set(made) == {"unet", "text_encoder"}
    for name, changes in LoraSets(opened, LoraDenoiser(opened, on_cpu=True)).changes(loras).items():
        [file] = made[name].glob("*.safetensors")
        fused, graph = load_file(file), opened.path(f"{name}/model.onnx")
        found = new_values(opened, name, [graph], changes, name)[graph]
        sources = sources_of(opened, name)
        assert len(found) == len(changes)
        for each in found:
            source_of = sources[each.initializer.name]
            value = each.value if source_of.axes is None else each.value.transpose(np.argsort(source_of.axes))
            np.testing.assert_array_equal(fused[source_of.weights[0]], value)


@pytest.mark.slow
def test_fused_hot_and_as_inputs_are_the_same(pipe, files, checkpoint_of, tmp_path):
    loras = [Lora(files["peft"], 0.6), Lora(files["kohya"], -0.3, 0.2)]
    fused = tmp_path / "fused.bundle"
    diffoundry.compile(checkpoint_of(CHECKPOINT), fused, tasks=["txt2img"], loras=loras)
    bare = drawn(pipe)
    pipe.set_loras(loras, as_inputs=False)
    hot = drawn(pipe)
    assert pipe.loras == tuple(loras)
    pipe.set_loras(loras, as_inputs=True)
    given = drawn(pipe)
    assert "unet_lora" in pipe.loaded
    assert "unet" not in pipe.loaded
    pipe.set_loras([])
    np.testing.assert_array_equal(drawn(pipe), bare)
    assert np.abs(hot - bare).max() > 1e-3
    np.testing.assert_array_equal(drawn(diffoundry.load(fused, engine="onnxruntime")), hot)
    np.testing.assert_allclose(given, hot, atol=NEAR, rtol=NEAR)
    assert "peft" in Bundle.open(fused).manifest.source["loras"]


@pytest.mark.parametrize("engine", ["openvino"])
def test_another_engine_draws_the_same(bundle, files, pipe, engine):
    other = diffoundry.load(bundle, engine=engine, precision="fp32")
    for as_inputs in (False, True):
        for each in (pipe, other):
            each.set_loras([(files["peft"], 0.6)], as_inputs=as_inputs)
        np.testing.assert_allclose(drawn(other), drawn(pipe), atol=1e-4, rtol=1e-3)
    other.set_loras([])
    pipe.set_loras([])
    np.testing.assert_allclose(drawn(other), drawn(pipe), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loop", ["host", "device"])
def test_rows_of_a_batch_have_sets_of_their_own(bundle, files, pipe, loop):
    rows = diffoundry.load(bundle, engine="onnxruntime", loop=loop)
    sets = [
        (Lora(files["peft"], 0.6),),
        (Lora(files["kohya"], 0.4),),
        (Lora(files["kohya"], -0.2), Lora(files["peft"], 0.3)),
    ]
    requests = [Request(PROMPT, seed=5 + i, loras=each, **ASKED) for i, each in enumerate(sets)]
    made = rows.generate_many(requests)
    for request, result in zip(requests, made, strict=True):
        np.testing.assert_allclose(result.latents, rows.generate(request).latents, atol=NEAR)
        pipe.set_loras(list(request.loras), as_inputs=False)
        np.testing.assert_allclose(result.latents, drawn(pipe, request.seed), atol=NEAR, rtol=NEAR)
    assert [each["strength"] for each in made[2].request["loras"]] == [-0.2, 0.3]


def test_a_row_without_runs_beside_one_with(pipe, files):
    plain = Request(PROMPT, seed=5, **ASKED)
    both = pipe.generate_many(
        [
            plain,
            Request(
                "a small white ring at the top on a black background", seed=6, loras=[Lora(files["peft"], 0.6)], **ASKED
            ),
        ]
    )
    np.testing.assert_allclose(both[0].latents, pipe.generate(plain).latents, atol=1e-4, rtol=1e-3)


def test_what_the_pipeline_has_acts_with_what_a_request_has(pipe, files):
    pipe.set_loras([(files["peft"], 0.6)])
    both = drawn(pipe, loras=[Lora(files["kohya"], 0.4)])
    pipe.set_loras([(files["peft"], 0.6), (files["kohya"], 0.4)], as_inputs=False)
    np.testing.assert_allclose(both, drawn(pipe), atol=NEAR, rtol=NEAR)


def test_a_form_without_factors_is_hot_where_nothing_is_asked(pipe, files):
    pipe.set_loras([(files["dora"], 0.5)])
    assert pipe.loras
    drawn(pipe)
    assert "unet" in pipe.loaded
    with pytest.raises(LoraError, match="magnitude"):
        pipe.set_loras([(files["dora"], 0.5)], as_inputs=True)
    with pytest.raises(LoraError, match="magnitude"):
        drawn(pipe, loras=[Lora(files["dora"])])


def test_a_small_rank_and_few_layers_are_said(copied, files):
    build(copied, lora_rank=2, lora_layers="attention")
    pipe = diffoundry.load(copied, engine="onnxruntime")
    with pytest.raises(LoraError, match="--lora-layers all"):
        pipe.set_loras([files["peft"]], as_inputs=True)
    build(copied, lora_rank=2, lora_layers="all")
    with pytest.raises(LoraError, match="--lora-rank 4`"):
        diffoundry.load(copied, engine="onnxruntime").set_loras([files["peft"]], as_inputs=True)
    build(copied, lora_rank=0)
    assert not Bundle.open(copied).manifest.wiring.lora_inputs


@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_bundle_without_such_a_denoiser_is_given_one_in_memory(bundle, bundle_of, files, loop):
    """It is the very graph that `build --lora-rank` writes."""
    plain, built = (diffoundry.load(path, engine="onnxruntime", loop=loop) for path in (bundle_of(CHECKPOINT), bundle))
    sets = (), (Lora(files["peft"], 0.6),), (Lora(files["kohya"], -0.2), Lora(files["peft"], 0.3))
    requests = [Request(PROMPT, seed=5 + i, loras=each, **ASKED) for i, each in enumerate(sets)]
    made = plain.generate_many(requests)
    for own, expected in zip(made, built.generate_many(requests), strict=True):
        np.testing.assert_array_equal(own.latents, expected.latents)
    assert plain.loaded.count("unet_lora") == 1
    assert plain.weight_bytes("unet_lora") == plain.weight_bytes("unet")
    plain.release_all()
    assert not plain.loaded


def test_in_memory_layers_take_factors_when_a_lora_first_changes_them(bundle, bundle_of, files, tmp_path):
    plain, built = (diffoundry.load(path, engine="onnxruntime") for path in (bundle_of(CHECKPOINT), bundle))
    attends = re.compile(r"unet\..*\.(to_[qkv]|to_out\.0)\.")
    few = {key: value for key, value in load_file(files["peft"]).items() if attends.match(key)}
    requests = [
        Request(PROMPT, seed=5, loras=[Lora(file, 0.6)], **ASKED)
        for file in (written(tmp_path / "few.safetensors", few), files["peft"])
    ]
    old, lora = plain.job(requests[0]), plain._loader.lora
    alone = plain.generate(requests[0]).latents
    np.testing.assert_allclose(alone, built.generate(requests[0]).latents, atol=NEAR, rtol=NEAR)
    wanted = built.generate_many(requests)
    for own, expected in zip(plain.generate_many(requests), wanted, strict=True):
        np.testing.assert_allclose(own.latents, expected.latents, atol=NEAR, rtol=NEAR)
    assert lora.layout == 2
    assert all(first < second for first, second in zip(lora.sizes(1), lora.sizes(2), strict=True))
    [ready] = plain.prepare([old])
    batch = plain.batch(ready)
    handle = batch.add(ready.samples[0])
    while batch:
        batch.step()
    np.testing.assert_array_equal(batch.take(handle), alone[0])


def test_in_memory_a_lora_of_texts_alone_is_taken(bundle, bundle_of, files, tmp_path):
    texts = {key: value for key, value in load_file(files["peft"]).items() if key.startswith("text_encoder.")}
    assert texts
    request = Request(PROMPT, seed=5, loras=[Lora(written(tmp_path / "texts.safetensors", texts), 0.8)], **ASKED)
    plain, built = (diffoundry.load(path, engine="onnxruntime") for path in (bundle_of(CHECKPOINT), bundle))
    found = plain.generate(request).latents
    np.testing.assert_allclose(found, built.generate(request).latents, atol=NEAR, rtol=NEAR)
    assert np.abs(found - drawn(plain, 5)).max() > 1e-3


def test_in_memory_threads_that_ask_first_share_one_layout(bundle_of, files):
    plain = diffoundry.load(bundle_of(CHECKPOINT), engine="onnxruntime")
    request = Request(PROMPT, seed=5, loras=[Lora(files["peft"], 0.6)], **ASKED)
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: plain.job(request), range(4)))
    assert {job.lora_layout for job in jobs} == {1}
    assert plain._loader.lora.layout == 1


def test_a_pipeline_that_has_drawn_takes_new_ones_as_inputs(bundle_of, files, monkeypatch):
    loras = [Lora(files["peft"], 0.6), Lora(files["kohya"], -0.3, 0.2)]
    few = Lora(files["kohya"], 0.4)
    small = diffoundry.load(bundle_of(CHECKPOINT), engine="onnxruntime")
    bare = drawn(small)
    small.set_loras(loras)
    hot = drawn(small)
    assert "unet_lora" not in small.loaded
    monkeypatch.setattr("diffoundry.engines.loader._SMALL_BYTES", 0)
    large = diffoundry.load(bundle_of(CHECKPOINT), engine="onnxruntime")
    large.set_loras(loras)
    np.testing.assert_allclose(drawn(large), hot, atol=NEAR, rtol=NEAR)
    assert "unet_lora" not in large.loaded
    large.set_loras([few])
    once = drawn(large)
    assert "unet" not in large.loaded
    large.set_loras([few], as_inputs=False)
    np.testing.assert_allclose(drawn(large), once, atol=NEAR, rtol=NEAR)
    assert "unet_lora" not in large.loaded
    large.set_loras([files["dora"]])
    drawn(large)
    assert "unet_lora" not in large.loaded
    large.set_loras([few])
    large.set_loras([])
    np.testing.assert_allclose(drawn(large), bare, atol=NEAR, rtol=NEAR)
    assert "unet_lora" not in large.loaded


def test_a_request_adds_its_own_to_changed_weights_in_memory(bundle_of, files):
    pipe = diffoundry.load(bundle_of(CHECKPOINT), engine="onnxruntime")
    pipe.set_loras([(files["dora"], 0.5)])
    both = drawn(pipe, loras=[Lora(files["kohya"], 0.4)])
    pipe.set_loras([(files["dora"], 0.5), (files["kohya"], 0.4)])
    np.testing.assert_allclose(both, drawn(pipe), atol=NEAR, rtol=NEAR)


def test_what_cannot_be_made_in_memory_is_said(bundle_of, files, monkeypatch):
    given = {"loras": [Lora(files["peft"])]}
    with pytest.raises(RequestError, match=r"build .* --lora-rank 32"):
        drawn(diffoundry.load(bundle_of(CHECKPOINT), engine="openvino"), **given)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    pipe = diffoundry.load(bundle_of(CHECKPOINT), engine="onnxruntime")
    assert not pipe.lora_denoiser
    with pytest.raises(RequestError, match=r"pip install 'diffoundry\[build\]'"):
        drawn(pipe, **given)
    with pytest.raises(RequestError, match=r"pip install 'diffoundry\[build\]'"):
        pipe.set_loras(given["loras"], as_inputs=True)
    pipe.set_loras(given["loras"])
    assert pipe.loras


def test_a_build_that_is_done_is_not_done_again(copied):
    build(copied, lora_rank=4)
    stamps = {path: path.stat().st_mtime_ns for path in (copied / "unet_lora").iterdir()}
    build(copied, lora_rank=4)
    assert stamps == {path: path.stat().st_mtime_ns for path in (copied / "unet_lora").iterdir()}


@pytest.mark.parametrize("kind", ["peft", "kohya", "dora"])
def test_a_file_changes_what_it_has_keys_for(weights, files, kind):
    opened = LoraFile.open(files[kind], weights)
    count = sum(map(len, opened.changes.values()))
    parts = 3 if kind in ("kohya", "dora") else 2
    assert count == len(load_file(files[kind])) // parts
    assert not opened.unused


def test_the_names_of_other_trainers(weights, tmp_path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = weights.shapes["unet"][f"{module}.weight"]
    down, up = np.ones((2, shape[1])), np.ones((shape[0], 2))
    for prefix, ends in {
        f"unet.{module}": (".lora_A.weight", ".lora_B.weight"),
        f"unet.{module} ": (".lora.down.weight", ".lora.up.weight"),
        f"base_model.model.unet.{module}": (".lora_A.default.weight", ".lora_B.default.weight"),
        f"base_model.model.{module}": (".lora_A.weight", ".lora_B.weight"),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": (".down.weight", ".up.weight"),
        f"lora_unet_{module.replace('.', '_')}": (".lora_down.weight", ".lora_up.weight"),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (".lora_down.weight", ".lora_up.weight"),
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (".lora_A.weight", ".lora_B.weight"),
    }.items():
        tensors = {prefix.strip() + end: each for end, each in zip(ends, (down, up), strict=True)}
        opened = LoraFile.open(written(tmp_path / "x.safetensors", tensors), weights)
        assert list(opened.changes["unet"]) == [f"{module}.weight"], prefix


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_lists_of_cloneofsimo(weights, tmp_path, suffix):
    order = [
        name
        for side in ("down_blocks", "up_blocks", "mid_block")
        for name in sorted(weights.shapes["unet"])
        if name.startswith(side) and ".attn1.to_q." in name
    ]
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
    layers += tuple(each.replace("attn1", "attn2") for each in layers[:4])
    names = [name.replace("attn1.to_q", layer) for name in order for layer in layers]
    rng = np.random.default_rng(0)
    pairs = []
    for name in names:
        gives, reads = weights.shapes["unet"][name]
        pairs += [rng.standard_normal((gives, 2)), rng.standard_normal((2, reads))]
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save([torch.from_numpy(each).float() for each in pairs], path)
    else:
        keys = [f"unet:{i}:{end}" for i in range(len(names)) for end in ("up", "down")]
        written(path, dict(zip(keys, pairs, strict=True)), unet="[]")
    changes = LoraFile.open(path, weights).changes["unet"]
    assert set(changes) == set(names)
    for i, name in enumerate(names):
        np.testing.assert_allclose(changes[name].parts["up"], pairs[2 * i], rtol=1e-6)


def test_the_scales_of_peft_are_read(weights, tmp_path):
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    gives, reads = weights.shapes["unet"][f"{module}.weight"]
    tensors = {f"unet.{module}.lora_A.weight": np.ones((4, reads)), f"unet.{module}.lora_B.weight": np.ones((gives, 4))}

    def scale(**config):
        stated = json.dumps({f"unet.{name}": value for name, value in config.items()})
        file = written(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=stated)
        return LoraFile.open(file, weights).changes["unet"][f"{module}.weight"].scale

    assert scale(lora_alpha=8) == 2
    assert scale(lora_alpha=8, use_rslora=True) == 4
    assert scale(lora_alpha=8, alpha_pattern={"attn1.to_q": 2}) == 0.5
    assert scale(r=4) == 1
    folder = tmp_path / "adapter"
    folder.mkdir()
    bare = {name.replace("unet.", "base_model.model."): value for name, value in tensors.items()}
    written(folder / "adapter_model.safetensors", bare)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    assert LoraFile.open(folder, weights).changes["unet"][f"{module}.weight"].scale == 0.5


def test_initializers_are_those_that_onnx_reads(bundle):
    for path in sorted(bundle.glob("*/*.onnx")):
        stored = {each.name: each for each in onnx.load(path).graph.initializer}
        found = read_initializers(path)
        assert found.keys() <= stored.keys()
        for name, each in found.items():
            np.testing.assert_array_equal(each.read(), onnx.numpy_helper.to_array(stored[name]))
        assert all(not tensor.raw_data for name, tensor in stored.items() if name not in found)


def test_a_damaged_model_is_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x3a\xff\xff\xff\x7f")
    with pytest.raises(EngineError, match="compile the bundle again"):
        read_initializers(tmp_path / "model.onnx")


class Evil:
    def __reduce__(self):
        return (print, ("evil",))


def test_a_pickle_is_read_as_weights_alone(tmp_path, capsys):
    held = {"a": torch.randn(3, 4).half(), "b": [torch.randn(2, 5).t(), torch.nn.Parameter(torch.ones(2))]}
    torch.save({**held, "c": torch.full((3,), 1.5, dtype=torch.bfloat16), "name": "fox"}, tmp_path / "x.pt")
    found, texts = read_pickle(tmp_path / "x.pt")
    assert texts == {"name": "fox"}
    np.testing.assert_array_equal(found["a"], held["a"].float().numpy())
    np.testing.assert_array_equal(found["b.0"], held["b"][0].numpy())
    np.testing.assert_array_equal(found["c"], np.full(3, 1.5, np.float32))
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(LoraError, match="holds code"):
        read_pickle(tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-100])
    with pytest.raises(LoraError, match="truncated"):
        read_pickle(tmp_path / "cut.pt")
    assert "evil" not in capsys.readouterr().out


REFUSED = {
    "empty": "is empty",
    "missing": "is no file",
    "text": "truncated or no safetensors",
    "nan": "not finite",
    "other": "changes nothing in",
    "flux": "is a LoRA for FLUX",
    "ip": "is an IP-Adapter: give it to",
    "wide": "other widths than",
    "more": "keys that change nothing in .*extra.lora_A",
    "half": "no up",
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_files_are_refused_in_one_line(bundle, files, tmp_path, called, what):
    good, path = load_file(files["peft"]), tmp_path / "x.safetensors"
    first = next(iter(good))
    if what == "empty":
        path.touch()
    elif what == "text":
        path.write_bytes(Path(files["peft"]).read_bytes()[:2000])
    elif what == "nan":
        written(path, good | {first: np.full_like(good[first], np.nan)})
    elif what == "other":
        written(path, {"a.lora_A.weight": np.ones((2, 2)), "a.lora_B.weight": np.ones((2, 2))})
    elif what == "flux":
        written(path, {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 2))})
    elif what == "ip":
        written(path, {"ip_adapter.1.to_k_ip.weight": np.ones((2, 2))})
    elif what == "wide":
        written(path, {name: np.concatenate([each, each], axis=int("lora_A" in name)) for name, each in good.items()})
    elif what == "more":
        written(path, good | {"unet.extra.lora_A.weight": np.ones((2, 2))})
    elif what == "half":
        written(path, {name: each for name, each in good.items() if name != first.replace("lora_A", "lora_B")})
    done = called("run", bundle, "a ring", "--lora", path, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert re.search(REFUSED[what], line), line
    assert not (tmp_path / "x.png").exists()


def test_keys_that_are_not_used_may_be_left_out(pipe, files, tmp_path):
    path = written(tmp_path / "x.safetensors", load_file(files["peft"]) | {"unet.extra.lora_A.weight": np.ones((2, 2))})
    with pytest.raises(LoraError, match="lora-ignore-unused"):
        pipe.set_loras([path])
    pipe.set_loras([Lora(path, 0.6, ignore_unused=True)])
    found = drawn(pipe)
    pipe.set_loras([(files["peft"], 0.6)])
    np.testing.assert_array_equal(found, drawn(pipe))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x=nan", "strength"),
        ("x=inf", "strength"),
        ("x=1:2:3", "strengths"),
        ("x=one", "FILE=STRENGTH"),
        ("=1", "path"),
    ],
)
def test_bad_strengths_are_refused(text, said):
    with pytest.raises(RequestError, match=said):
        Lora.parse(text)


def test_strengths_are_read_off_a_text(tmp_path):
    assert Lora.parse("a/b.safetensors") == Lora("a/b.safetensors")
    assert Lora.parse("b=0.8") == Lora("b", 0.8)
    assert Lora.parse("a=b=-0.8:0") == Lora("a=b", -0.8, 0.0)
    (tmp_path / "v=2").touch()
    assert Lora.parse(str(tmp_path / "v=2")).strength == 1
    assert Lora.parse(str(Lora("b", 0.5, 0.25))) == Lora("b", 0.5, 0.25)


def test_the_same_file_twice_and_too_many_are_refused(pipe, files):
    with pytest.raises(RequestError, match="twice"):
        pipe.set_loras([files["peft"], (files["peft"], 0.5)])
    with pytest.raises(RequestError, match="too many"):
        pipe.set_loras([f"{i}.safetensors" for i in range(200)])
    for bad in ("x", [3], {"x": 1}, [("a", "b", "c", "d")]):
        with pytest.raises(DiffoundryError):
            pipe.set_loras(bad)


def test_a_failed_change_leaves_the_pipeline_as_it_was(pipe, files):
    pipe.set_loras([(files["peft"], 0.6)])
    before = drawn(pipe)
    with pytest.raises(LoraError):
        pipe.set_loras(["nowhere.safetensors"])
    assert [lora.strength for lora in pipe.loras] == [0.6]
    np.testing.assert_array_equal(drawn(pipe), before)


def test_a_file_that_changes_is_read_again(pipe, files, tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(files["peft"], path)
    pipe.set_loras([(path, 0.6)])
    first = drawn(pipe)
    written(path, {name: 0.5 * each for name, each in load_file(files["peft"]).items()}, other="size")
    pipe.set_loras([(path, 0.6)])
    assert np.abs(drawn(pipe) - first).max() > 1e-3


def test_equal_sets_have_the_same_factors(bundle, files):
    opened = Bundle.open(bundle)
    sets = LoraSets(opened, LoraDenoiser(opened, on_cpu=True))
    first, second = (sets.padded((Lora(files["peft"], 0.6),), 8, 1) for _ in "12")
    assert first[0] is second[0]
    assert first[0].shape[1] == 8
    assert sets.padded((), 8, 1)[0] is sets.padded((), 8, 1)[0]


def test_weights_that_a_model_has_in_another_form_are_said(pipe):
    loader = pipe._loader
    changes = {"unet": {"no.such.weight": lambda weight: weight}}
    with pytest.raises(EngineError, match=r"--precision fp32.*compile --lora"):
        loader.change(changes, {})
    assert not loader.changed


@pytest.mark.slow
def test_a_checkpoint_with_an_adapter_inside_is_both(checkpoint_of, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint_of(CHECKPOINT), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "conv1", "linear_1"]
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    pipe.save_pretrained(tmp_path / "adapted")
    made = pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )
    ours = diffoundry.load(diffoundry.compile(tmp_path / "adapted", tmp_path / "b", tasks=["txt2img"]).root)
    np.testing.assert_allclose(drawn(ours), made.images.numpy(), atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_plans_and_graphs_for_cuda_take_loras(copied):
    build(copied, lora_rank=8, lora_layers="all")
    scan = diffoundry.Scan(prompts=(PROMPT,), steps=3)
    build(copied, engine="onnxruntime:cuda", precision="fp16", scan=scan)
    fused = read_report(Bundle.open(copied), "fusion")["fp16/onnxruntime:cuda"]["unet_lora"]
    assert fused["max_abs_error"] < fused["allowed"]
    assert fused["operators"]["after"]["MultiHeadAttention"] == 8
    build(copied, engine="tensorrt-rtx", precision="fp16", target=diffoundry.Target(archs=("sm89",), batch=(1, 2)))
    made = Bundle.open(copied)
    plans = {each["component"]: each for each in read_report(made, "plans")["plans"]}
    shapes = plans["unet_lora"]["profile"]["shapes"]["lora_down"]
    assert [each[0] for each in shapes] == [1, 1, 4]
    assert [each[2] for each in shapes] == [1, 8, 8]
    assert all(check.passed for check in verify(made))


def test_other_forms_are_brought_to_the_rank(pipe, weights, tmp_path):
    """A LoHa of rank 3 is a product of rank 9 at most; of 16 nothing is lost, and what is lost is told."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"):
        gives, *reads = weights.shapes["unet"][f"{module}.weight"]
        named = f"lora_unet_{module.replace('.', '_')}"
        for i in (1, 2):
            tensors[f"{named}.hada_w{i}_a"] = 0.5 * rng.standard_normal((gives, 3))
            tensors[f"{named}.hada_w{i}_b"] = 0.5 * rng.standard_normal((3, int(np.prod(reads))))
    file = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(LoraError, match=r"loha, no product of two factors.*--lora-approximate"):
        pipe.set_loras([file], as_inputs=True)
    pipe.set_loras([(file, 0.2)], as_inputs=False)
    hot = drawn(pipe)
    with pytest.warns(RuntimeWarning, match=r"rank 16: up to 0\.0 %"):
        pipe.set_loras([Lora(file, 0.2, approximate=True)])
    assert np.abs(hot - drawn(pipe)).max() < 1e-4
    assert "unet_lora" in pipe.loaded
    change = LoraFile.open(file, weights).changes["unet"]["down_blocks.0.resnets.0.conv1.weight"]
    whole = change.added(np.zeros(change.shape, np.float32), 1.0).reshape(change.shape[0], -1)
    down, up, share = change.nearest(np.zeros(change.shape, np.float32), 1.0, 4)
    sizes = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(share, np.linalg.norm(sizes[4:]) / np.linalg.norm(sizes), rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(whole - up @ down.reshape(4, -1)), np.linalg.norm(sizes[4:]), rtol=1e-3)


def test_hot_and_as_inputs_draw_the_same(pipe, files):
    bare = drawn(pipe)
    loras = [Lora(files["peft"], 0.6), Lora(files["kohya"], -0.3, 0.2)]
    pipe.set_loras(loras, as_inputs=False)
    hot = drawn(pipe)
    pipe.set_loras(loras, as_inputs=True)
    assert pipe.loras == tuple(loras)
    np.testing.assert_allclose(drawn(pipe), hot, atol=NEAR, rtol=NEAR)
    assert "unet" not in pipe.loaded
    pipe.set_loras([])
    np.testing.assert_array_equal(drawn(pipe), bare)
    assert np.abs(hot - bare).max() > 1e-3


def test_layers_that_a_set_leaves_as_they_are_are_spared(bundle, pipe, files, tmp_path):
    both = {key: value for key, value in load_file(files["peft"]).items() if key.startswith("unet.")}
    attends = {key: value for key, value in both.items() if re.search(r"\.(to_[qkv]|to_out\.0)\.", key)}
    few, rest = (
        Lora(written(tmp_path / f"{i}.safetensors", each), 0.6)
        for i, each in enumerate((attends, {key: value for key, value in both.items() if key not in attends}))
    )
    requests = [Request(PROMPT, seed=5, loras=loras, **ASKED) for loras in ((few,), (rest,), ())]
    alone = [pipe.generate(request).latents for request in requests]
    for result, each in zip(pipe.generate_many(requests), alone, strict=True):
        np.testing.assert_allclose(result.latents, each, atol=NEAR)
    for request, each in zip(requests, alone, strict=True):
        pipe.set_loras(request.loras, as_inputs=False)
        np.testing.assert_allclose(drawn(pipe, 5), each, atol=NEAR, rtol=NEAR)
    graphs = Bundle.open(bundle).component("unet_lora")
    cuts = {
        key: sum(node.op_type == "Slice" and "spared" in node.name for node in onnx.load(bundle / own.model).graph.node)
        for key, own in graphs.variants.items()
    }
    assert cuts[f"{FULL}/{STANDARD}"] == 0
    assert cuts[f"{FULL}/openvino"] == 0
    assert cuts[f"{FULL}/onnxruntime:cpu"] == 6


@pytest.mark.slow
def test_the_simulated_device_takes_loras(copied, files, simulated_sessions):
    build(copied, lora_rank=16, lora_layers="all")
    cpu = diffoundry.load(copied, engine="onnxruntime")
    build(copied, engine="onnxruntime:cuda", precision="fp32")
    gpu = diffoundry.load(copied, engine="onnxruntime:cuda", precision="fp32")
    sets = (), (Lora(files["peft"], 0.6),), (Lora(files["kohya"], 0.4), Lora(files["peft"], -0.2))
    requests = [Request(PROMPT, seed=5 + i, loras=each, **ASKED) for i, each in enumerate(sets)]
    wanted = cpu.generate_many(requests)
    for _ in range(4):
        for found, expected in zip(gpu.generate_many(requests), wanted, strict=True):
            np.testing.assert_allclose(found.latents, expected.latents, atol=5e-3)
    assert gpu.info()["captured"]
    for each in (gpu, cpu):
        each.set_loras([(files["peft"], 0.6)])
    np.testing.assert_allclose(drawn(gpu), drawn(cpu), atol=5e-3)


HOSTILE = {
    "index": {"unet:900000000:up": (2, 2), "unet:0:down": (2, 2)},
    "digits": {"unet:\u00b2:up": (2, 2)},
    "scalar": {"{}.lora_down.weight": (), "{}.lora_up.weight": (48, 4)},
    "zero": {"{}.lora_down.weight": (0, 384), "{}.lora_up.weight": (48, 0)},
    "magnitude": {"{}.lora_down.weight": (4, 48), "{}.lora_up.weight": (48, 4), "{}.dora_scale": (1, 49)},
    "blocks": {"{}.oft_blocks": (12, 4, 3)},
    "butterfly": {"{}.oft_blocks": (3, 16, 3, 3)},
    "kronecker": {"{}.lokr_w1_a": (60000, 1), "{}.lokr_w1_b": (1, 60000), "{}.lokr_w2": (1, 1)},
    "alpha": {"{}.lora_down.weight": (4, 48), "{}.lora_up.weight": (48, 4), "{}.alpha": (3,)},
    "core": {"{}.a1.weight": (48, 4), "{}.a2.weight": (4, 48), "{}.b1.weight": (48, 4), "{}.b2.weight": (4, 48),
             "{}.bm.weight": (3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_by_their_shapes(pipe, tmp_path, what):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {name.format(module): np.ones(shape) for name, shape in HOSTILE[what].items()}
    with pytest.raises(LoraError):
        pipe.set_loras([written(tmp_path / "x.safetensors", tensors)])
    assert not pipe.loras


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("[" * 100_000, "damaged"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "alpha"),
        ('{"unet.lora_alpha": [1]}', "alpha"),
    ],
)
def test_hostile_metadata_are_refused(pipe, files, tmp_path, stated, said):
    with pytest.raises(LoraError, match=said):
        pipe.set_loras([written(tmp_path / "x.safetensors", load_file(files["peft"]), lora_adapter_metadata=stated)])


@pytest.mark.parametrize("kind", ["many", "repeated", "packed"])
def test_a_small_pickle_stays_small(tmp_path, kind):
    path = tmp_path / "x.pt"
    if kind == "many":
        torch.save([[[[0] * 100] * 100] * 100] * 100, path)
    elif kind == "repeated":
        torch.save(torch.zeros(1).expand(1 << 33), path)
    else:
        torch.save(torch.zeros(1000), tmp_path / "y.pt")
        with zipfile.ZipFile(tmp_path / "y.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
    with pytest.raises(LoraError):
        read_pickle(path)


def test_numbers_that_are_too_large_are_refused(pipe, files, tmp_path):
    good = {name: each.astype(np.float64) for name, each in load_file(files["peft"]).items()}
    first = next(iter(good))
    for value, said in ((1e300, "not finite"), (1e30, "above")):
        save_file(good | {first: np.full_like(good[first], value)}, tmp_path / "x.safetensors")
        with pytest.raises(LoraError, match=said):
            pipe.set_loras([tmp_path / "x.safetensors"])
    save_file({name: each.astype(np.int8) for name, each in good.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match="type int8"):
        pipe.set_loras([tmp_path / "x.safetensors"])


def test_a_hot_set_and_that_of_a_request_are_added_in_the_text_too(pipe, checkpoint_of):
    moon, twice = (checkpoint_of(CHECKPOINT) / "lora" / f"{name}.safetensors" for name in ("moon", "twice"))
    pipe.set_loras([moon], as_inputs=False)
    both = drawn(pipe, prompt="a small green moon twice on a black background", loras=[Lora(twice)])
    pipe.set_loras([moon, twice])
    found = drawn(pipe, prompt="a small green moon twice on a black background")
    np.testing.assert_allclose(both, found, atol=1e-4, rtol=1e-3)


def test_texts_are_encoded_with_what_the_pipeline_has(pipe, checkpoint_of):
    moon = checkpoint_of(CHECKPOINT) / "lora" / "moon.safetensors"
    found = []
    for as_inputs in (False, True):
        pipe.set_loras([moon], as_inputs=as_inputs)
        found.append(pipe.encode(["a moon"])[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    pipe.set_loras([])
    assert np.abs(pipe.encode(["a moon"])[0] - found[0]).max() > 0.1


def test_a_set_stays_what_it_was_when_its_file_goes(pipe, files, tmp_path):
    for as_inputs in (True, False):
        path = tmp_path / "x.safetensors"
        shutil.copy(files["peft"], path)
        pipe.set_loras([(path, 0.6)], as_inputs=as_inputs)
        before = pipe(PROMPT, seed=3, **ASKED)
        written(path, {name: 0.5 * each for name, each in load_file(files["peft"]).items()}, other="size")
        for _ in "12":
            after = pipe(PROMPT, seed=3, **ASKED)
            np.testing.assert_array_equal(after.latents, before.latents)
            assert after.request["loras"] == before.request["loras"]
            path.unlink(missing_ok=True)


def test_a_bundle_whose_wiring_and_graph_disagree_is_refused(copied):
    build(copied, lora_rank=4)
    manifest = json.loads((copied / "bundle.json").read_text())
    own = manifest["wiring"]["lora_inputs"]
    for wrong in (
        {**own, "unet": own["unet_lora"]},
        {"unet": own["unet_lora"]},
        {"unet_lora": {**own["unet_lora"], "weights": []}},
        {"unet_lora": {**own["unet_lora"], "down": "sample"}},
        {"unet_lora": {**own["unet_lora"], "weights": own["unet_lora"]["weights"][:1] * 2}},
    ):
        changed = {**manifest, "wiring": {**manifest["wiring"], "lora_inputs": wrong}}
        (copied / "bundle.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError, match="do not agree"):
            diffoundry.load(copied)
