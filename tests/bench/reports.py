"""Reports that the tests of the views share: made by hand, with figures as a run would give them."""

from __future__ import annotations

import random
from dataclasses import replace

from diffoundry.bench.report import (
    BatchTried,
    BundleSummary,
    Clock,
    Cold,
    ComponentCost,
    Machine,
    Offline,
    Peaks,
    RateTried,
    Report,
    Scenario,
    Server,
    Settings,
    Stages,
    System,
    Turn,
)
from diffoundry.bench.timing import ratio

HOSTILE = "</title><script>alert('1')</script> & \"x\" | `y` $\\frac{1}{0}$ \x00\x1b[31m\u202e\ud800 <!--"


def turns(seconds, count=25, noise=0.02, seed=1, told=True):
    """Turns of about `seconds`: 4 % before the first step, 6 % in it, 80 % in 19 further ones, 10 % after them."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        whole = seconds * draw.lognormvariate(0, noise) * (1.35 if draw.random() < 0.05 else 1.0)
        step = 0.8 * whole / 19
        stages = Stages(
            before=0.04 * whole,
            first_step=0.06 * whole,
            steps=(step,) * 19,
            after=0.1 * whole,
            tokenize=0.001 * whole,
            text=0.03 * whole,
            denoiser=(0.95 * step,) * 20,
            loop=(0.05 * step,) * 20,
            decode=0.09 * whole,
        )
        made.append(Turn(whole, stages if told else Stages()))
    return tuple(made)


def cold(seconds, count=3, seed=1):
    draw = random.Random(seed)
    factors = [draw.lognormvariate(0, 0.03) for _ in range(count)]
    return tuple(Cold(0.2 * s, 0.5 * s, 0.6 * s, s) for s in (seconds * factor for factor in factors))


def system(name="diffoundry", title="diffoundry, onnxruntime", seconds=0.1, **changes):
    seed = sum(map(ord, name))
    made = System(
        name=name,
        title=title,
        precision="fp32",
        versions={name: "1.2.3", "numpy": "2.3.0"},
        cold=cold(5 * seconds, seed=seed),
        turns=turns(seconds, seed=seed),
        peak_rss_bytes=int(3e8 + 1e9 * seconds),
    )
    return replace(made, **changes)


def against(ours, theirs):
    """`theirs` with its ratios to ours, pair by pair."""
    pairs = min(len(ours.turns), len(theirs.turns))
    lists = [[turn.seconds for turn in each.turns[:pairs]] for each in (theirs, ours)]
    steps = [[turn.stages.steps[0] for turn in each.turns[:pairs] if turn.stages.steps] for each in (theirs, ours)]
    told = len(steps[0]) == len(steps[1]) == pairs
    return replace(theirs, ratio=ratio(*lists), ratio_step=ratio(*steps) if told else None)


def report(*systems, **changes):
    """Of pico; ours alone, or `systems` with ours first."""
    systems = systems or (system(),)
    made = Report(
        date="2026-03-01T12:00:00+00:00",
        complete=True,
        command="diffoundry bench build/pico.bundle --checkpoint examples/pico --vs diffusers --steps 20",
        bundle=BundleSummary("pico", "stable-diffusion", "examples/pico", "ab" * 32),
        request=Settings(
            prompt="a large red star at the left on a navy background",
            negative_prompt=None,
            width=64,
            height=64,
            steps=20,
            guidance=4.0,
            scheduler=None,
            seed=7,
            count=1,
            engine="onnxruntime",
            precision="fp32",
            threads=2,
            scenario="single",
            turns=25,
            cold=3,
        ),
        machine=Machine(
            processor="AMD EPYC 9R14 96-Core Processor",
            cores=2,
            instruction_sets=("avx2", "avx512f", "avx512_bf16"),
            clock_mhz=Clock(3600.0, 3700.0),
            memory_bytes=8 << 30,
            gpu=None,
            system="Linux 6.1",
            python="3.12.3",
            versions={"onnxruntime": "1.22.1", "numpy": "2.3.0"},
            load=0.2,
            peaks=Peaks({"fp32": 2.1e11, "bf16": 5.5e11}, 2.4e10),
        ),
        systems=(systems[0], *(against(systems[0], each) for each in systems[1:])),
        components=(
            ComponentCost("text_encoder", 1, 0.002, 1.2e8, 4e6, 0.29, 0.08),
            ComponentCost("unet", 20, 0.0041, 6.2e8, 9e6, 0.72, 0.09),
            ComponentCost("vae_decoder", 1, 0.009, None, None, None, None),
        ),
        reference="diffusers, fp32" if len(systems) > 1 else "",
    )
    return replace(made, **changes)


def five(**changes):
    """Ours and four others: the reference, an identical picture, another picture, and one that failed."""
    return report(
        system(psnr_db=78.2, max_levels=1),
        system("diffusers", "diffusers 0.36, eager", 0.41),
        system("compile", "diffusers 0.36, torch.compile with mode max-autotune-no-cudagraphs", 0.22, max_levels=0),
        system(
            "sdcpp",
            "stable-diffusion.cpp",
            0.35,
            psnr_db=31.4,
            max_levels=87,
            changes_picture=True,
            turns=turns(0.35, told=False),
        ),
        System(
            "openvino-genai",
            "OpenVINO GenAI 2025.4",
            "fp32",
            error="RuntimeError: Check 'unet_config.contains(cross_attention_dim)' failed at src/cpp/src/unet.cpp:31",
        ),
        **changes,
    )


def offline(**changes):
    made = report(system(), system("diffusers", "diffusers 0.36, eager", 0.41))
    rows = tuple(
        Offline(
            name, best, 40 * best, 8, tuple(BatchTried(n, n / f, f) for n, f in zip((1, 2, 4, 8), rates, strict=True))
        )
        for name, best, rates in (("diffoundry", 14.1, (10, 12, 13.5, 14.1)), ("diffusers", 5.2, (2.4, 3.6, 4.7, 5.2)))
    )
    request = replace(made.request, scenario="offline", batch=8)
    return replace(made, scenario=Scenario("offline", offline=rows), request=request, **changes)


def server(**changes):
    made = report(system(), system("diffusers", "diffusers 0.36, eager", 0.41))
    rows = tuple(
        Server(name, 1.0, best, (0.2, 0.3, 0.9), tuple(RateTried(rate, p99) for rate, p99 in tried))
        for name, best, tried in (
            ("diffoundry", 7.0, ((1, 0.12), (8, 2.4), (4, 0.2), (6, 0.45), (7, 0.9))),
            ("diffusers", 1.5, ((1, 0.6), (2, 3.1), (1.5, 0.95))),
        )
    )
    request = replace(made.request, scenario="server", p99_s=1.0)
    return replace(made, scenario=Scenario("server", server=rows), request=request, **changes)


def extremes(**changes):
    """A tiny and a huge time, a name without end, a single turn, and nothing told."""
    return report(
        system(seconds=4.2e-4),
        system("huge", "a system whose name goes on and on and on without any end in sight at all " * 3, 912.0),
        system("once", "once", 3.3, turns=turns(3.3, 1)),
        system("nothing", "", 0.5, turns=turns(0.5, told=False), cold=()),
        **changes,
    )


def hostile(**changes):
    """Names and texts that would break out of whatever they are put into."""
    made = five(
        date=HOSTILE, command=f"diffoundry bench {HOSTILE}", reference=HOSTILE, notes=(HOSTILE,), complete=False
    )
    systems = [replace(each, title=HOSTILE, precision=HOSTILE, versions={HOSTILE: HOSTILE}) for each in made.systems]
    systems[1] = replace(systems[1], info={HOSTILE: [HOSTILE, {"a": None}]})
    systems[-1] = replace(systems[-1], error=HOSTILE)
    return replace(
        made,
        bundle=BundleSummary(HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        request=replace(made.request, prompt=HOSTILE, scheduler=HOSTILE, negative_prompt=HOSTILE),
        machine=replace(made.machine, processor=HOSTILE, system=HOSTILE, versions={HOSTILE: HOSTILE}),
        systems=tuple(systems),
        components=(ComponentCost(HOSTILE, 1, 0.1),),
        **changes,
    )


ALL = {
    "one": report,
    "five": five,
    "offline": offline,
    "server": server,
    "extremes": extremes,
    "hostile": hostile,
    "interrupted": lambda: report(system(), system("diffusers", turns=(), cold=()), complete=False),
    "failed": lambda: report(system(turns=(), cold=(), error="no turn", peak_rss_bytes=None), components=()),
}
