"""What plans are built for: sizes, batches, architectures, and the profiles that they make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffoundry.bundle import Bundle
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
