"""Rows that come and go between steps, and runs that are looked at after each step and left at any time.

On the host the loop's arithmetic is held to the bit: the real U-Net runs each row by itself there, so that nothing but
the loop can change one. On the simulated GPU it runs from a plan for four rows, whatever is asked of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from diffoundry.common.errors import EngineError, RequestError
from diffoundry.engines.engine import Engine
from diffoundry.engines.gpu.gpu import Gpu
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine
from diffoundry.engines.tensorrt.engine import TensorRTEngine
from diffoundry.runtime.loaded import PLAIN
from diffoundry.runtime.loop.batch import Batch
from diffoundry.runtime.loop.device import DeviceStepper, Phases
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.loop.host import HostStepper
from diffoundry.runtime.loop.noise import TorchGenerator
from diffoundry.runtime.loop.sample import KeptRegion, Ports, Sample, Skipping
from diffoundry.runtime.pipeline import Pipeline, Request, load
from diffoundry.runtime.schedulers import make_table
from diffoundry.tests.engines.tensorrt.simulated import write_plan
from diffoundry.tests.runtime.loop.test_device import step_shapes

PROMPT = "a large red star at the left on a navy background"
CLOSE = 1e-4
GUIDED = Guidance(7.5)
LONG = {"seed": 7, "steps": 20, "scheduler": "dpm++2m"}
SHORT = [
    {"seed": 1, "steps": 8, "scheduler": "euler"},
    {"seed": 2, "steps": 8, "scheduler": "ddpm", "guidance": Guidance(4, rescale=0.7)},
    {"seed": 3, "steps": 11, "scheduler": "pndm", "guidance": Guidance(5, interval=(0.2, 0.6))},
    {"seed": 4, "steps": 8, "scheduler": "euler_a", "guidance": Guidance(1.0)},
]


class OneByOne(Engine):
    """An engine that runs each row of a call by itself."""

    def __init__(self, engine):
        super().__init__(engine.component, engine.inputs, engine.outputs)
        self._engine = engine

    def to_device(self, array):
        return self._engine.to_device(array)

    def _run(self, feeds):
        made = [self._engine({n: a[i : i + 1] for n, a in feeds.items()}) for i in range(len(feeds["sample"]))]
        return {name: np.concatenate([each[name] for each in made]) for name in made[0]}

    def _bind_host(self, feeds, twice):
        return lambda *changed: self._run(feeds)

    def _bind_device(self, tensors):
        raise EngineError("runs on the host alone")


class Promised(OneByOne):
    """An engine that holds the rows of each call against what was said of them: `promised`, call by call."""

    def __init__(self, engine):
        super().__init__(engine)
        self.promised = []

    def _bind_host(self, feeds, twice):
        def run(*changed):
            for name in twice:
                first, second = np.split(feeds[name], 2)
                assert np.array_equal(first, second), name
            self.promised.append((len(feeds["sample"]), twice))
            return self._run(feeds)

        return run


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return load(bundle_of("pico"))


@pytest.fixture(scope="module")
def texts(pipe):
    return [{"encoder_hidden_states": embedding} for embedding in pipe.encode([PROMPT, ""])[0]]


@pytest.fixture
def sample(pipe, texts):
    """Make a sample: its generator is new each time, and the next noise of it the same."""

    def make(seed, steps, scheduler, guidance=GUIDED, **others):
        table, generator = make_table(pipe.bundle.scheduler_config(), steps, scheduler), TorchGenerator(seed)
        latents = generator.randn(4, 8, 8) * np.float32(table.init_scale)
        return Sample(table, guidance, generator, *texts, latents, **others)

    return make


@pytest.fixture
def one_by_one(pipe):
    engine = OneByOne(pipe.engine("unet"))
    return lambda: HostStepper(engine)


@pytest.fixture
def on_gpu(pipe, trt, tmp_path):
    """The simulated GPU, with a plan of the U-Net for four rows."""
    gpu, bundle = Gpu(), pipe.bundle
    sizes = {"sample": (4, 4, 8, 8), "timestep": (4,), "encoder_hidden_states": (4, 77, 64)}
    shapes = {
        "unet": {name: (shape,) * 3 for name, shape in sizes.items()},
        "step": step_shapes(bundle.component("step").inputs),
    }

    def engine(name):
        component = bundle.component(name)
        plan = write_plan(tmp_path, name, bundle.path(component.variant("fp32").model), shapes[name])
        return TensorRTEngine(name, component.inputs, component.outputs, [plan], gpu)

    phases = Phases(engine("unet"), engine("step"))
    return lambda: DeviceStepper(phases)


def finish(batch, *handles):
    while batch:
        batch.step()
    return [batch.take(handle) for handle in handles]


def alone(stepper, sample):
    batch = Batch(stepper())
    return finish(batch, batch.add(sample))[0]


@pytest.fixture(params=["one_by_one", "on_gpu"])
def stepper(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("short", SHORT, ids=lambda asked: asked["scheduler"])
def test_a_row_that_joins_others_is_what_it_is_alone(stepper, sample, short):
    wanted = [alone(stepper, sample(**asked)) for asked in (LONG, short)]
    assert abs(wanted[0] - wanted[1]).max() > 0.1
    batch = Batch(stepper())
    first = batch.add(sample(**LONG))
    for _ in range(5):
        batch.step()
    second = batch.add(sample(**short))
    assert len(batch) == 2
    for found, each in zip(finish(batch, first, second), wanted, strict=True):
        np.testing.assert_array_equal(found, each)
    assert batch.done == ()


@pytest.mark.parametrize("beside", SHORT[1:3], ids=lambda asked: asked["scheduler"])
def test_a_row_beside_one_that_is_dropped_is_what_it_is_alone(stepper, sample, beside):
    wanted = alone(stepper, sample(**LONG))
    batch = Batch(stepper())
    dropped, kept = batch.add(sample(**beside)), batch.add(sample(**LONG))
    for _ in range(5):
        batch.step()
    before = batch.latents(kept)
    batch.drop(dropped)
    np.testing.assert_array_equal(batch.latents(kept), before)
    assert len(batch) == 1
    np.testing.assert_array_equal(finish(batch, kept)[0], wanted)
    with pytest.raises(RequestError, match=f"the batch has no row {dropped}: it was dropped"):
        batch.take(dropped)


def test_a_row_takes_the_place_of_another(stepper, sample):
    wanted = alone(stepper, sample(**SHORT[0]))
    batch = Batch(stepper())
    first = batch.add(sample(**LONG))
    batch.step(5)
    batch.drop(first)
    np.testing.assert_array_equal(finish(batch, batch.add(sample(**SHORT[0])))[0], wanted)


def test_a_row_that_inpaints_joins_too(one_by_one, sample):
    rng = np.random.default_rng(0)
    mask, image, noise = (rng.standard_normal((n, 8, 8)).astype(np.float32) for n in (1, 4, 4))
    region = KeptRegion((mask > 0).astype(np.float32), image, noise)
    asked = {**SHORT[0], "kept": region}
    wanted = alone(one_by_one, sample(**asked))
    np.testing.assert_array_equal(wanted[:, mask[0] <= 0], image[:, mask[0] <= 0])
    batch = Batch(one_by_one())
    batch.add(sample(**LONG))
    batch.step(None)
    batch.add(sample(**LONG))
    batch.step(5)
    np.testing.assert_array_equal(finish(batch, batch.add(sample(**asked)))[0], wanted)


def test_a_third_prediction_is_added_in_its_steps(one_by_one, sample, texts):
    """Where it is that of the negative text, p_n + s (p − p_n) + t (p − p_n) is guidance by s + t."""
    skipping = Skipping(texts[1], 2.0, after=-1, before=99)
    found = alone(one_by_one, sample(1, 6, "euler", Guidance(3.0), skipping=skipping))
    plain = alone(one_by_one, sample(1, 6, "euler", Guidance(3.0)))
    np.testing.assert_allclose(found, alone(one_by_one, sample(1, 6, "euler", Guidance(5.0))), atol=CLOSE)
    batch = Batch(one_by_one())
    split = batch.add(sample(1, 6, "euler", Guidance(3.0, "split"), skipping=skipping))
    other = batch.add(sample(**SHORT[2]))
    made = finish(batch, split, other)
    np.testing.assert_array_equal(made[0], found)
    np.testing.assert_array_equal(made[1], alone(one_by_one, sample(**SHORT[2])))
    for after, before in ((5, 99), (-1, 0), (2.5, 3)):  # no step lies in between
        never = sample(1, 6, "euler", Guidance(3.0), skipping=Skipping(texts[1], 2.0, after, before))
        np.testing.assert_array_equal(alone(one_by_one, never), plain)


def test_a_device_leaves_a_third_prediction_to_the_host(on_gpu, sample, texts):
    with pytest.raises(RequestError, match="nor skips layers: use the loop 'host'"):
        Batch(on_gpu()).add(sample(1, 6, "euler", skipping=Skipping(texts[1], 2.0, -1, 99)))


@pytest.mark.parametrize("kind", ["host", "device"])
def test_rows_of_one_call_of_the_real_unet_are_close_to_those_alone(pipe, sample, kind):
    phases = Phases(pipe.engine("unet"), pipe.engine("step"))

    def stepper():
        return DeviceStepper(phases) if kind == "device" else HostStepper(pipe.engine("unet"))

    every = [LONG, *SHORT]
    wanted = [alone(stepper, sample(**asked)) for asked in every]
    batch, handles = Batch(stepper()), []
    for asked in every:
        handles.append(batch.add(sample(**asked)))
        batch.step(2)
    for found, each in zip(finish(batch, *handles), wanted, strict=True):
        np.testing.assert_allclose(found, each, atol=CLOSE)


def test_what_a_device_ran_in_is_kept_when_the_rows_change(on_gpu, sample, simulated_cuda):
    for _ in range(3):
        batch = Batch(on_gpu())
        batch.add(sample(**LONG))
        batch.step(5)
        other = batch.add(sample(**{**SHORT[0], "steps": 20}))
        batch.step(5)
        batch.drop(other)
        batch.step(5)
        batch.close()
        assert len(batch) == 0
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2  # five steps of one row and of two
    assert len(on_gpu()._phases._idle) == 2


def test_what_cannot_run_beside_the_others_is_refused(pipe, one_by_one, on_gpu, sample):
    batch = Batch(one_by_one())
    handle = batch.add(sample(**LONG))
    whole = sample(**SHORT[0])
    short = {"encoder_hidden_states": whole.prompt["encoder_hidden_states"][:20]}
    for wrong, message in (
        (
            replace(whole, latents=np.zeros((4, 8, 16))),
            r"latents is \(4, 8, 8\) in the batch and \(4, 8, 16\)",
        ),
        (replace(whole, channels=np.zeros((5, 8, 8))), "channels is None in the batch"),
        (
            replace(whole, prompt=short, negative=short),
            r"encoder_hidden_states is \(77, 64\) in the .* \(20, 64",
        ),
        (replace(whole, prompt=short), "prompt and its negative must be of one size"),
        (replace(whole, negative=None), "needs the inputs of its negative prompt"),
    ):
        with pytest.raises(RequestError, match=message):
            batch.add(wrong)
    assert len(batch) == 1
    with pytest.raises(RequestError, match="row 0 has 20 steps left"):
        batch.take(handle)
    with pytest.raises(RequestError, match="has no row 5"):
        batch.latents(5)
    with pytest.raises(RequestError, match=r"joint guidance .* use the loop 'host'"):
        Batch(on_gpu()).add(sample(**{**SHORT[0], "guidance": Guidance(5, mode="split")}))


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_denoiser_may_name_its_inputs_as_it_likes(pipe, sample, tmp_path, kind):
    """One of them even as an input of the `step` graph, which is another thing."""
    names = {"sample": "hidden_states", "timestep": "t", "encoder_hidden_states": "guidance"}
    model = onnx.load(pipe.bundle.root / "unet" / "model.onnx")
    for value in model.graph.input:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, tmp_path / "model.onnx")
    engine = OnnxRuntimeEngine.load(tmp_path / "model.onnx", component="transformer", threads=1)
    ports = Ports("hidden_states", "t")
    phases = Phases(engine, pipe.engine("step"), ports)

    def renamed(asked):
        made = sample(**asked)
        prompt, negative = ({"guidance": text["encoder_hidden_states"]} for text in (made.prompt, made.negative))
        return replace(made, prompt=prompt, negative=negative)

    def stepper():
        return DeviceStepper(phases) if kind == "device" else HostStepper(engine, ports)

    for asked in SHORT[:2]:
        wanted = alone(lambda: HostStepper(pipe.engine("unet")), sample(**asked))
        np.testing.assert_allclose(alone(stepper, renamed(asked)), wanted, atol=1e-3)
    if kind == "host":
        with pytest.raises(EngineError, match="transformer: the model and the pipeline do not agree on encoder_hidden"):
            alone(stepper, sample(**SHORT[0]))


def test_latents_may_have_any_axes(sample):
    """Elementwise models: one of videos, one of the same numbers as pictures."""
    text, found = np.full((2, 3), 0.01, np.float32), []
    for shape in ((4, 3, 8, 8), (4, 24, 8)):
        axes, ones = ", ".join("CFHW"[-len(shape) :]), ", ".join("1" * len(shape))
        model = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 20]>
            g (float[B, {axes}] sample, float[B] timestep, float[B, S, D] text) => (float[B, {axes}] out)
            <int64[2] words = {{1, 2}}, int64[{len(shape) + 1}] each_row = {{-1, {ones}}}>
            {{
                told = ReduceSum<keepdims = 0>(text, words)
                shift = Reshape(told, each_row)
                shifted = Add(sample, shift)
                out = Tanh(shifted)
            }}"""
        )
        onnx.checker.check_model(model, full_check=True)
        session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        engine = OnnxRuntimeEngine(session, "video", "cpu")
        batch = Batch(HostStepper(engine))
        guided = replace(
            sample(**SHORT[1]),
            prompt={"text": text},
            negative={"text": -text},
            latents=np.linspace(-1, 1, 768, dtype=np.float32).reshape(shape),
        )
        found.append(finish(batch, batch.add(guided), batch.add(replace(guided, generator=TorchGenerator(5)))))
    for video, picture in zip(*found, strict=True):
        np.testing.assert_array_equal(video.reshape(-1), picture.reshape(-1))


def asked_of(**options):
    return Request(PROMPT, **{"seed": 7, "steps": 6, "scheduler": "ddpm", **options})


def test_a_run_yields_after_each_step_and_has_the_result_in_the_end(pipe):
    request, seen = asked_of(count=3), []
    wanted = pipe.generate(request, batch=2, callback=lambda *step: seen.append(step))
    run = pipe.steps(request, batch=2)
    with pytest.raises(RequestError, match="no result before its last step"):
        run.result  # noqa: B018
    found = list(run)
    assert [(each.step, each.total) for each in found] == [(k, 12) for k in range(1, 13)]
    for each, (step, total, latents) in zip(found, seen, strict=True):
        assert (each.step, each.total) == (step, total)
        np.testing.assert_array_equal(each.latents, latents)
    np.testing.assert_array_equal(found[5].latents, wanted.latents[:2])
    np.testing.assert_array_equal(run.result.latents, wanted.latents)
    assert run.result.seeds == [7, 8, 9] and len(run.result.images) == 3
    assert list(run) == [] and run.result.seeds == [7, 8, 9]


def test_a_run_refuses_what_cannot_be_done_before_its_first_step(pipe):
    for wrong, message in ((asked_of(width=63), "multiple of 8"), ("a ring", "list of Request")):
        with pytest.raises(RequestError, match=message):
            pipe.steps(wrong)
    with pytest.raises(RequestError, match="batch"):
        pipe.steps(asked_of(), batch=0)


@pytest.mark.parametrize("leave", ["break", "close"])
def test_a_run_may_be_left_at_any_time(pipe, leave):
    wanted = pipe.generate(asked_of())
    run = pipe.steps(asked_of(), low_memory=True)
    for progress in run:
        if progress.step == 3:
            break
    if leave == "close":
        run.close()
        assert next(run, None) is None
        with pytest.raises(RequestError, match="no result"):
            run.result  # noqa: B018
    np.testing.assert_array_equal(pipe.generate(asked_of()).latents, wanted.latents)
    two = [pipe.steps(asked_of()), pipe.steps(asked_of(seed=8))]  # turn by turn
    for _ in range(6):
        latents = [next(run).latents for run in two]
    np.testing.assert_array_equal(latents[0], wanted.latents)
    assert abs(latents[1] - wanted.latents).max() > 0.1


def test_a_run_on_a_device_gives_back_what_it_ran_in_when_it_is_left(pipe, on_gpu, simulated_cuda):
    phases = on_gpu()._phases
    engines = {"unet": lambda: phases._denoiser, "step": lambda: phases._step}
    device = Pipeline(pipe.bundle, loop="device", engines=engines)
    wanted = pipe.generate(asked_of()).latents
    for leave_at in (1, 3, 5):
        run = device.steps(asked_of())
        for progress in run:
            if progress.step == leave_at:
                break
        assert not device._engines._phases[PLAIN]._idle
        run.close()
        assert len(device._engines._phases[PLAIN]._idle) == 1
    memory = simulated_cuda.used
    run = device.steps(asked_of())
    *_, last = run
    np.testing.assert_allclose(last.latents, wanted, atol=5e-3)
    np.testing.assert_array_equal(run.result.latents, last.latents)
    assert simulated_cuda.used == memory


@pytest.mark.parametrize("mode", ["joint", "split"])
def test_the_halves_of_a_call_repeat_where_it_is_said(pipe, sample, mode):
    engine = Promised(pipe.engine("unet"))
    batch = Batch(HostStepper(engine))
    guided = [sample(7, 4, "euler", Guidance(5, mode)), sample(8, 6, "euler_a", Guidance(3, mode, interval=(0, 0.5)))]
    for each in guided:
        batch.add(each)
    for _ in range(6):
        batch.step()
    said = ("sample", "timestep")
    if mode == "split":
        assert {twice for _, twice in engine.promised} == {()}
    else:  # both guided, then the first alone, then both gone but for the second, unguided
        assert engine.promised == [(4, said)] * 3 + [(3, ())] + [(1, ())] * 2
