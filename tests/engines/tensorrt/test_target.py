"""What plans are built for: sizes, batches, architectures, and the profiles that they make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffoundry.bundle import Bundle, Tensor
from diffoundry.common.errors import DiffoundryError, EngineError
from diffoundry.engines.tensorrt.bundle_plans import resolve_machine
from diffoundry.engines.tensorrt.target import Target, profiles, rows_of_denoiser


@pytest.fixture(scope="module")
def manifest(bundle_of):
    return Bundle.open(bundle_of("pico")).manifest


def shapes(profile, name):
    return profile.shapes[name]


def test_the_default_is_a_static_plan_of_the_checkpoints_own_size(manifest):
    (unet,) = profiles(manifest, "unet", Target())
    assert unet.static and unet.name == "64x64, batch 1"
    assert shapes(unet, "sample") == ((2, 4, 8, 8),) * 3
    assert shapes(unet, "encoder_hidden_states") == ((2, 77, 64),) * 3
    (decoder,) = profiles(manifest, "vae_decoder", Target())
    assert shapes(decoder, "latent_sample") == ((1, 4, 8, 8),) * 3
    (encoder,) = profiles(manifest, "vae_encoder", Target())
    assert shapes(encoder, "sample") == ((1, 3, 64, 64),) * 3


def test_sizes_batch_and_a_range(manifest):
    target = Target(sizes=((64, 128), (64, 64)), dynamic=((32, 32), (256, 128)), batch=(1, 4))
    first, second, last = profiles(manifest, "unet", target)
    assert [first.name, second.name, last.name] == [
        "64x128, batch 1-4",
        "64x64, batch 1-4",
        "32x32-256x128, batch 1-4",
    ]
    assert shapes(first, "sample") == ((1, 4, 16, 8), (2, 4, 16, 8), (8, 4, 16, 8))  # height before width
    assert shapes(last, "sample") == ((1, 4, 4, 4), (2, 4, 8, 8), (8, 4, 16, 32))
    assert [p.static for p in profiles(manifest, "vae_decoder", target)] == [True, True, False]
    for each in (target, Target(), Target(sizes=((64, 64), (64, 64))), Target(dynamic=target.dynamic)):
        assert each.count() == len(profiles(manifest, "unet", each))


def test_what_does_not_depend_on_the_size_has_one_plan(manifest):
    target = Target(sizes=((64, 64), (128, 64)), batch=(1, 8))
    (text,) = profiles(manifest, "text_encoder", target)
    assert shapes(text, "input_ids") == ((1, 77), (2, 77), (16, 77))
    (step,) = profiles(manifest, "step", target)
    assert shapes(step, "registers")[0] == (1, 1, 4, 8, 8)
    assert shapes(step, "registers")[2] == (16, 12, 4, 8, 16)
    assert shapes(step, "model_output")[2] == (16, 4, 8, 16)
    assert shapes(step, "weights")[2] == (16, 1000, 12, 15)


@pytest.fixture(scope="module")
def flux(bundle_of):
    return Bundle.open(bundle_of("flux-dev-small")).manifest


def test_tokens_that_a_request_may_choose_are_an_axis_of_its_own(flux):
    def lengths(component, name, target):
        (profile,) = profiles(flux, component, target)
        return [shape[1] for shape in shapes(profile, name)], profile.name

    plain, ranged = Target(sizes=((64, 64),)), Target(sizes=((64, 64),), tokens=(40, 512))
    assert lengths("transformer", "encoder_hidden_states", plain) == ([512] * 3, "64x64, batch 1")
    assert lengths("text_encoder_2", "input_ids", plain) == ([512] * 3, "512 tokens, 1-8 prompts")
    found = lengths("transformer", "encoder_hidden_states", ranged)
    assert found == ([40, 512, 512], "64x64, batch 1, 40-512 tokens")
    assert lengths("text_encoder_2", "input_ids", ranged) == ([40, 512, 512], "40-512 tokens, 1-8 prompts")
    assert lengths("text_encoder", "input_ids", ranged) == ([77] * 3, "77 tokens, 1-8 prompts")  # CLIP's window
    one = Target(sizes=((64, 64),), tokens=(128, 128))
    assert lengths("transformer", "encoder_hidden_states", one) == ([128] * 3, "64x64, batch 1, 128 tokens")


def test_tokens_join_the_windows_that_have_one_length(flux):
    clip = replace(flux.wiring.text[0], hidden="hidden_states.1")
    t5 = replace(flux.wiring.text[1], length=256)
    beside = replace(flux, wiring=replace(flux.wiring, text=(clip, t5)))
    zeros = replace(flux, wiring=replace(flux.wiring, text=(clip,), zeros=256))
    target = Target(sizes=((64, 64),), tokens=(64, 512))
    for each in (beside, zeros):
        (profile,) = profiles(each, "transformer", target)
        assert [shape[1] for shape in shapes(profile, "encoder_hidden_states")] == [77 + 64, 77 + 256, 77 + 512]


def test_windows_as_long_as_their_prompts_take_multiples(flux):
    filled = replace(flux, wiring=replace(flux.wiring, text=(replace(flux.wiring.text[1], bucket=32),)))
    sized = {"sizes": ((64, 64),)}

    def lengths(target):
        return [shape[1] for shape in shapes(profiles(filled, "transformer", target)[0], "encoder_hidden_states")]

    assert lengths(Target(**sized)) == [32, 64, 512]
    assert lengths(Target(**sized, tokens=(96, 256))) == [96, 96, 256]
    with pytest.raises(DiffoundryError, match="multiple of 32 tokens: give --tokens in multiples"):
        lengths(Target(**sized, tokens=(40, 256)))


def test_tokens_that_no_request_can_choose_are_refused(flux, manifest):
    with pytest.raises(DiffoundryError, match="at most 512 tokens of a prompt, found --tokens 64-600"):
        profiles(flux, "transformer", Target(tokens=(64, 600)))
    with pytest.raises(DiffoundryError, match="windows of one length: leave --tokens out"):
        profiles(manifest, "unet", Target(tokens=(64, 77)))


def test_a_picture_that_is_seen_has_sizes_of_its_own(flux):
    """As of FLUX.1 Kontext: the picture is brought to one of these, whatever is drawn."""
    sizes = ((672, 1568), (1024, 1024), (1392, 752), (1568, 672))
    shown = Tensor("picture", "float32", ("batch_size", 16, "picture_height", "picture_width"))
    transformer = flux.components["transformer"]
    kontext = replace(
        flux,
        components={**flux.components, "transformer": replace(transformer, inputs=(*transformer.inputs, shown))},
        wiring=replace(flux.wiring, inputs={**flux.wiring.inputs, "picture": "picture"}, picture_sizes=sizes),
    )
    target = Target(sizes=((64, 80), (96, 96)))
    first, second = profiles(kontext, "transformer", target)
    assert shapes(first, "sample") == ((1, 16, 10, 8),) * 3 and shapes(second, "sample") == ((1, 16, 12, 12),) * 3
    assert shapes(first, "picture") == ((1, 16, 84, 84), (1, 16, 128, 128), (1, 16, 196, 196))
    for width, height in sizes:
        asked = {name: usual for name, (_, usual, _) in first.shapes.items()}
        assert first.takes({**asked, "picture": (1, 16, height // 8, width // 8)})
    (encoder,) = profiles(kontext, "vae_encoder", target)  # which encodes the picture alone
    assert shapes(encoder, "sample") == ((1, 3, 672, 672), (1, 3, 1024, 1024), (1, 3, 1568, 1568))
    assert [p.name for p in profiles(kontext, "vae_decoder", target)] == ["64x80", "96x96"]


def test_the_rows_of_the_unet_follow_the_guidance(manifest):
    assert rows_of_denoiser(manifest, (1, 1)) == (2, 2, 2)
    assert rows_of_denoiser(manifest, (2, 4)) == (2, 4, 8)
    assert rows_of_denoiser(replace(manifest, default_guidance=0.0), (3, 3)) == (3, 3, 3)


def test_every_sampler_fits_the_plan_of_the_step(manifest, bundle_of):
    from diffoundry.runtime.schedulers import SAMPLERS, Steps, make_table
    from diffoundry.runtime.schedulers.forecast import FORECAST_FROM

    config = Bundle.open(bundle_of("pico")).scheduler_config()
    most = max(
        make_table({**config, "timestep_spacing": "leading"}, Steps(20), name, options).registers
        for name in SAMPLERS
        for options in ({}, {"solver_order": 3})
        if options == {} or name.startswith(("dpm", "deis", "unipc"))
        if not (options and name.startswith(("dpm++2m-sde", "dpm++3m-sde")))
    )
    (step,) = profiles(manifest, "step", Target())
    assert most >= 6 and most + FORECAST_FROM <= shapes(step, "registers")[2][1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(batch=(0, 1)), "the batch must be from 1"),
        (lambda: Target(batch=(4, 1)), "the batch must be from 1"),
        (lambda: Target(flags=("fast",)), "unknown flag 'fast'"),
        (lambda: Target(memory_limit=0), "a number of bytes above 0, found 0"),
        (lambda: Target(dynamic=((64, 64), (32, 64))), "MIN-MAX"),
        (lambda: Target(archs="sm89"), "archs must be a tuple of names, found 'sm89'"),
        (lambda: Target(archs=(5,)), "archs must be a tuple of names"),
        (lambda: Target(flags=None), "flags must be a tuple of names"),
        (lambda: Target(sizes=(64, 64)), "a size must be a width and a height"),
        (lambda: Target(sizes=((64.0, 64.0),)), "a size must be a width and a height"),
        (lambda: Target(sizes=((64, 64, 64),)), "a size must be a width and a height"),
        (lambda: Target(sizes="64x64"), "a size must be a width and a height"),
        (lambda: Target(dynamic=5), "the smallest and the largest size"),
        (lambda: Target(dynamic=((64, 64),)), "the smallest and the largest size"),
        (lambda: Target(batch=4), "the fewest and the most images"),
        (lambda: Target(batch=(1, 2.5)), "the fewest and the most images"),
        (lambda: Target(batch=(True, True)), "the fewest and the most images"),
        (lambda: Target(memory_limit=float("nan")), "a number of bytes above 0"),
        (lambda: Target(tokens=64), "the fewest and the most of a prompt, found 64"),
        (lambda: Target(tokens=(64, 32)), "the smaller number first, found 64-32"),
        (lambda: Target(tokens=(0, 32)), "must be 1 or more"),
        (lambda: Target(memory_limit="5"), "a number of bytes above 0"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(DiffoundryError, match=message):
        make()


@pytest.mark.parametrize("size", [(60, 64), (0, 64), (64, 16392)])
def test_a_side_that_the_checkpoint_cannot_do_is_refused(manifest, size):
    with pytest.raises(DiffoundryError, match="multiples of 8 from 8 to 16384"):
        profiles(manifest, "unet", Target(sizes=(size,)))


@pytest.mark.parametrize(
    ("precision", "target", "message"),
    [
        ("fp32", Target(archs=("sm89", "sm90x")), "does not know the architecture 'sm90x': choose from sm75"),
        ("fp32", Target(archs=("sm90",)), r"other GPUs, such as Hopper's \(sm90\), take --engine onnxruntime:cuda"),
        ("bf16", Target(archs=("sm75", "sm89")), "sm75 has no bfloat16: use --precision fp16"),
        ("fp16", Target(archs=("sm89",), flags=("refit",)), "refit plans are built on the machine that has the GPU"),
        ("fp16", Target(archs=("sm89",), flags=("strip",)), "strip plans are built on the machine that has the GPU"),
        ("fp16", Target(archs=("sm89",), flags=("version-compatible",)), "builds no version-compatible plans"),
        ("fp16", Target(archs=("sm89",), flags=("hardware-compatible",)), "builds no hardware-compatible plans"),
    ],
)
def test_a_target_is_held_against_the_backend_before_any_work(precision, target, message):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=message):
        resolve_machine("tensorrt-rtx", precision, target)


def test_without_a_gpu_the_architectures_must_be_named():
    pytest.importorskip("tensorrt_rtx")
    from diffoundry.engines.gpu.device import Device

    try:
        Device().close()
    except EngineError:
        with pytest.raises(EngineError, match=r"no NVIDIA GPU.*: refit plans are built on the machine that has"):
            resolve_machine("tensorrt-rtx", "fp16", Target(flags=("refit",)))
        with pytest.raises(EngineError, match=r"no NVIDIA GPU.*: name the GPUs to build for, of --arch sm75,sm80"):
            resolve_machine("tensorrt-rtx", "fp16", Target())
    else:
        assert resolve_machine("tensorrt-rtx", "fp16", Target()).device
