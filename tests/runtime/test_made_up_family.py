"""A family that no file of the project knows is a wiring: it is traced, bundled and run, and equals a loop in torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from diffoundry import load
from diffoundry.bundle import (
    Component,
    Latents,
    Manifest,
    Tensor,
    TextEncoder,
    Tokenizer,
    Variant,
    Wiring,
)
from diffoundry.bundle.manifest import to_json
from diffoundry.common.errors import BundleError, RequestError
from diffoundry.common.files import sha256_file
from diffoundry.export.graphs.spec import Axis, ComponentSpec
from diffoundry.export.graphs.trace import trace

PICO = Path(__file__).parents[2] / "examples" / "pico" / "tokenizer"
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
WINDOW, SCALING, SHIFT = 77, 0.7, 0.1
PROMPTS = "a red star", "a small blue ring"
GUIDANCE, STEPS, SEED = 3.5, 5, 11


class Wide(torch.nn.Module):
    """Hidden states of 12 numbers, and a pooled embedding."""

    def __init__(self, tokens):
        super().__init__()
        self.table = torch.nn.Embedding(tokens, 12)
        self.mix = torch.nn.Linear(12, 12)

    def forward(self, ids):
        hidden = self.table(ids)
        return torch.tanh(self.mix(hidden)), hidden.mean(1)


class Narrow(torch.nn.Module):
    """Hidden states of 8 numbers."""

    def __init__(self, tokens):
        super().__init__()
        self.table = torch.nn.Embedding(tokens, 8)

    def forward(self, ids):
        return torch.sin(self.table(ids) * 3)


class Transformer(torch.nn.Module):
    """A denoiser with names of its own (`guidance` is the timestep), which is given the guidance."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.of_context, self.of_pooled = torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)

    def forward(self, x, guidance, context, summary, strength):
        places = torch.cumsum(torch.full_like(context[:, :, :1], 0.01), 1)  # so that the order of the encoders counts
        told = self.of_context(context * places).mean(1) + self.of_pooled(summary)
        scale = (guidance / 1000 + strength / 10)[:, None, None, None]
        return torch.tanh(self.inner(x) + told[:, :, None, None]) * scale


class Decoder(torch.nn.Module):
    """Eight pixels a latent."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.ConvTranspose2d(4, 3, 8, stride=8)

    def forward(self, z):
        return torch.tanh(self.out(z))


IDS = (Tensor("ids", "int64", ("batch_size", "sequence_length")),)
TEXT_AXES = {"batch_size": Axis(1, 3), "sequence_length": Axis(8, WINDOW)}
CONTEXT = ("batch_size", "context_length", 12)


def states(name, width):
    return Tensor(name, "float32", ("batch_size", "sequence_length", width))


def spec(name, module, inputs, outputs, axes, tokens=0):
    integers = {"ids": tokens} if tokens else {}
    return ComponentSpec(name, name, lambda: module, lambda: module, inputs, outputs, axes, integers)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bundle, and the torch modules that it was made of."""
    root = tmp_path_factory.mktemp("made_up")
    shutil.copytree(PICO, root / "words")
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    tokenizer = CLIPTokenizer.from_pretrained(PICO)
    tokens = len(tokenizer)
    torch.manual_seed(3)
    modules = {"wide": Wide(tokens), "narrow": Narrow(tokens), "transformer": Transformer(), "painter": Decoder()}
    modules = {name: module.eval() for name, module in modules.items()}
    grid = {"batch_size": Axis(1, 3), "height": Axis(4, 12), "width": Axis(4, 12)}
    image = ("batch_size", 4, "height", "width")
    denoiser = (
        Tensor("x", "float32", image),
        Tensor("guidance", "float32", ("batch_size",)),
        Tensor("context", "float32", CONTEXT),
        Tensor("summary", "float32", ("batch_size", 12)),
        Tensor("strength", "float32", ("batch_size",)),
    )
    specs = [
        spec(
            "wide",
            modules["wide"],
            IDS,
            (states("hidden", 12), Tensor("pool", "float32", ("batch_size", 12))),
            TEXT_AXES,
            tokens,
        ),
        spec("narrow", modules["narrow"], IDS, (states("states", 8),), TEXT_AXES, tokens),
        spec(
            "transformer",
            modules["transformer"],
            denoiser,
            (Tensor("y", "float32", image),),
            {**grid, "context_length": Axis(8, 2 * WINDOW)},
        ),
        spec(
            "painter",
            modules["painter"],
            (Tensor("z", "float32", image),),
            (Tensor("pixels", "float32", ("batch_size", 3, "tall", "broad")),),
            grid,
        ),
    ]
    roles = {"wide": "text", "narrow": "text", "transformer": "denoiser", "painter": "decoder"}
    weights = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}
    components = {}
    for each in specs:
        (root / each.name).mkdir()
        trace(each, modules[each.name], root / each.name)
        model = f"{each.name}/model.onnx"
        variant = Variant(model, {model: sha256_file(root / model)})
        components[each.name] = Component(roles[each.name], each.inputs, each.outputs, {"fp32/onnx": variant})
    small = ["scheduler/scheduler_config.json", *(f"words/{path.name}" for path in sorted((root / "words").iterdir()))]
    manifest = Manifest(
        family="made-up",
        tasks=("txt2img",),
        precision="fp32",
        components=components,
        wiring=Wiring(
            text=(
                TextEncoder("wide", "words", text=0, hidden="hidden", pooled="pool"),
                TextEncoder("narrow", "words", text=1, hidden="states", join="sequence"),
            ),
            inputs={
                "x": "latents",
                "guidance": "timestep",
                "context": "text.hidden",
                "summary": "text.pooled",
                "strength": "guidance",
            },
        ),
        latents=Latents(4, 8, SCALING, SHIFT),
        tokenizers={"words": Tokenizer(WINDOW, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)},
        files={name: sha256_file(root / name) for name in small},
        default_width=64,
        default_height=64,
        default_steps=STEPS,
        default_guidance=GUIDANCE,
    )
    (root / "bundle.json").write_text(json.dumps(to_json(manifest)))
    for name, module in ((n, type(m)) for n, m in modules.items()):
        modules[name] = (module(tokens) if roles[name] == "text" else module()).eval()
        modules[name].load_state_dict(weights[name])
    return root, modules, tokenizer


@torch.no_grad()
def drawn(modules, tokenizer, prompts, guidance, steps=STEPS, seed=SEED):
    """Latents and pixels, by a loop in torch with the scheduler of diffusers."""
    ids = [
        tokenizer(p, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt").input_ids
        for p in prompts
    ]
    (wide, summary), narrow = modules["wide"](ids[0]), modules["narrow"](ids[1])
    context = torch.cat([wide, torch.nn.functional.pad(narrow, (0, 4))], dim=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(steps)
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        y = modules["transformer"](x, t[None], context, summary, torch.tensor([guidance]))
        x = scheduler.step(y, t, x).prev_sample
    return x.numpy(), modules["painter"](x / SCALING + SHIFT).numpy()


@pytest.mark.parametrize("second", [None, PROMPTS[1]])
@pytest.mark.parametrize("guidance", [None, 0.5, 9.0])
def test_it_draws_what_torch_draws(made, second, guidance):
    root, modules, tokenizer = made
    prompts = PROMPTS[0], second or PROMPTS[0]
    latents, pixels = drawn(modules, tokenizer, prompts, GUIDANCE if guidance is None else guidance)
    options = {} if guidance is None else {"guidance": guidance}
    pipe = load(root)
    found = pipe(PROMPTS[0], prompt_2=second, seed=SEED, **options)
    np.testing.assert_allclose(found.latents, latents, atol=1e-4)
    np.testing.assert_allclose(pipe.decode(found.latents), pixels, atol=1e-4)
    assert found.images[0].size == (64, 64)


def test_every_part_of_the_wiring_counts(made):
    root, modules, tokenizer = made
    latents, _ = drawn(modules, tokenizer, PROMPTS, GUIDANCE)
    others = [
        drawn(modules, tokenizer, (PROMPTS[1], PROMPTS[1]), GUIDANCE)[0],
        drawn(modules, tokenizer, (PROMPTS[0], PROMPTS[0]), GUIDANCE)[0],
        drawn(modules, tokenizer, PROMPTS, GUIDANCE + 1)[0],
    ]
    assert all(np.abs(other - latents).max() > 1e-3 for other in others)


def test_what_it_does_not_heed_is_refused(made):
    pipe = load(made[0])
    for options in (
        {"negative_prompt": "a ring"},
        {"guidance_rescale": 0.5},
        {"clip_skip": 1},
        {"image": np.zeros((64, 64, 3), np.uint8)},
    ):
        with pytest.raises(RequestError, match=r"no effect|not hold the task|from 0 to 0"):
            pipe(PROMPTS[0], **options)
    assert not pipe.loaded


def test_a_source_that_nobody_knows_is_refused(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "b")
    manifest = json.loads((root / "bundle.json").read_text())
    manifest["wiring"]["inputs"]["summary"] = "weather"
    (root / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the made-up denoiser reads weather; this version knows latents"):
        load(root)
