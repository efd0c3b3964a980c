"""Two runs of the same agree, whatever the noise; what became slower is found."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from diffoundry.bench.compare import compare, text
from diffoundry.bench.noise import interval
from diffoundry.bench.report import Gpu, Peaks
from diffoundry.tests.bench.reports import ALL, cold, five, hostile, offline, report, server, system, turns


def run(seed, count=15, *, slow=1.0, machine=1.0, drift=0.02, noise=0.02, peers=True, starts=3):
    """A run of ours, `slow` times slower, on a machine that is `machine` times slower; drift: between runs."""
    factor = machine * random.Random(seed).lognormvariate(0, drift)
    ours = system(turns=turns(0.1 * factor * slow, count, noise, seed), cold=cold(0.5 * factor * slow, starts, seed))
    peer = system("diffusers", "diffusers", 0.4, turns=turns(0.4 * factor, count, noise, seed + 1), cold=())
    return report(ours, *([peer] if peers else []))


def share_of_slower(count, pairs=40, **changes):
    found = [
        compare(run(100 + i, count, **{**changes, "slow": 1.0}), run(900 + i, count, **changes)).slower
        for i in range(pairs)
    ]
    return sum(found) / pairs


@pytest.mark.parametrize("count", [5, 10, 15, 30])
@pytest.mark.parametrize("noise", [0.005, 0.02, 0.06])
def test_two_runs_of_the_same_agree(count, noise):
    assert share_of_slower(count, noise=noise) <= 0.05


@pytest.mark.parametrize("count", [5, 15, 30])
def test_they_agree_without_a_peer_too(count):
    assert share_of_slower(count, peers=False, drift=0.015) <= 0.1


@pytest.mark.parametrize(("count", "slow"), [(5, 1.3), (15, 1.15), (30, 1.15)])
def test_what_became_slower_is_found(count, slow):
    assert share_of_slower(count, slow=slow) >= 0.85


def test_of_one_start_nothing_is_said():
    found = compare(run(1, starts=1), run(2, starts=1, slow=3.0))
    assert {row.verdict for row in found.rows if row.what.startswith("cold")} == {"same"}
    found = compare(run(1), run(2, slow=3.0))
    assert "slower" in {row.verdict for row in found.rows if row.what.startswith("cold")}


def test_faster_is_found_and_is_not_slower():
    found = compare(run(1, slow=1.5), run(2))
    assert not found.slower
    assert "faster" in {row.verdict for row in found.rows if row.what == "turn"}


def test_a_slower_machine_is_not_a_slower_system():
    found = compare(run(1), run(2, machine=1.5))
    assert not found.slower
    assert any("the machine itself was up to" in line and "slower" in line for line in found.warnings)


def test_a_slower_system_on_a_slower_machine_is_found_by_its_peer():
    found = compare(run(1), run(2, machine=1.5, slow=1.3))
    assert [row.what for row in found.rows if row.verdict == "slower" and row.what.startswith("turn, against")]
    assert found.slower


def test_the_peaks_tell_of_the_machine_where_no_peer_does():
    old, new = run(1, peers=False), run(2, machine=1.4, peers=False)
    assert compare(old, new).slower
    peaks = Peaks({"fp32": 2.1e11 / 1.45}, 2.4e10)
    slower = replace(new, machine=replace(new.machine, peaks=peaks))
    assert not compare(old, slower).slower
    assert any("machine itself" in line for line in compare(old, slower).warnings)


def test_a_peer_of_another_version_tells_nothing_of_the_machine():
    old, new = run(1), run(2, machine=1.5)
    other = replace(new.systems[1], versions={"diffusers": "9"})
    found = compare(old, replace(new, systems=(new.systems[0], other)))
    assert found.slower
    assert any("diffusers 1.2.3, now 9" in line for line in found.notes)


def test_one_stage_that_became_slower_is_named():
    old, new = run(1), run(2)
    late = tuple(
        replace(turn, seconds=turn.seconds + 0.02, stages=replace(turn.stages, after=turn.stages.after + 0.02))
        for turn in new.systems[0].turns
    )
    found = compare(old, replace(new, systems=(replace(new.systems[0], turns=late), new.systems[1])))
    slower = {row.what for row in found.rows if row.verdict == "slower"}
    assert "decode, after" in slower
    assert not slower & {"further steps", "text, before", "first step"}


def test_a_stage_that_hardly_counts_does_not():
    old, new = run(1, drift=0), run(2, drift=0)
    late = tuple(
        replace(turn, stages=replace(turn.stages, before=turn.stages.before + 0.0006)) for turn in new.systems[0].turns
    )
    found = compare(old, replace(new, systems=(replace(new.systems[0], turns=late), new.systems[1])))
    assert not found.slower


def test_a_cold_start_that_became_slower_is_named():
    old, new = run(1), run(2)
    started = replace(new.systems[0], cold=cold(0.9))
    found = compare(old, replace(new, systems=(started, new.systems[1])))
    assert "cold start, first picture" in {row.what for row in found.rows if row.verdict == "slower"}


def test_rates_that_fell_are_slower():
    old = offline()
    rows = old.scenario.offline
    fallen = replace(old, scenario=replace(old.scenario, offline=(replace(rows[0], images_per_s=9.0), rows[1])))
    assert compare(old, fallen).slower
    assert not compare(fallen, old).slower
    assert not compare(server(), server()).slower


def test_a_peer_that_became_slower_is_not_ours():
    old, new = five(), five()
    slow = replace(new.systems[3], turns=turns(0.9, told=False), versions={"sdcpp": "2"})
    found = compare(old, replace(new, systems=(*new.systems[:3], slow, new.systems[4])))
    assert not found.slower
    assert "slower" in {row.verdict for row in found.rows if row.name == "sdcpp"}


def test_what_has_no_figures_any_more_is_slower():
    assert compare(report(), ALL["failed"]()).slower
    assert any("no turn" in line for line in compare(report(), ALL["failed"]()).notes)
    assert not compare(ALL["failed"](), report()).slower


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, machine=replace(r.machine, processor="Other")), "another processor: AMD"),
        (lambda r: replace(r, machine=replace(r.machine, cores=4)), "another number of cores: 2, now 4"),
        (lambda r: replace(r, machine=replace(r.machine, gpu=Gpu("H100", 1))), "another GPU: none, now H100"),
        (lambda r: replace(r, request=replace(r.request, precision="bf16")), "another precision: fp32, now bf16"),
        (lambda r: replace(r, request=replace(r.request, steps=4)), "another steps: 20, now 4"),
        (lambda r: replace(r, request=replace(r.request, negative_prompt="x")), "another negative_prompt: none, now x"),
        (lambda r: replace(r, bundle=replace(r.bundle, name="sdxl")), "another bundle: pico, now sdxl"),
        (lambda r: replace(r, complete=False), "the new run was interrupted"),
        (lambda r: replace(r, machine=replace(r.machine, load=3.0)), "busy when the new run began: load 3.0"),
    ],
)
def test_what_does_not_compare_is_warned_of(change, words):
    assert any(words in line for line in compare(five(), change(five())).warnings)
    assert compare(five(), five()).warnings == ()


def test_a_faster_machine_is_told_apart_when_it_is_another():
    old = run(1, peers=False)
    new = run(2, machine=0.5, peers=False)
    new = replace(new, machine=replace(new.machine, processor="Other", peaks=Peaks({"fp32": 4.2e11}, 4.8e10)))
    assert {row.verdict for row in compare(old, new).rows if row.what == "turn"} == {"faster"}


def test_other_counts_of_turns_are_no_difference():
    assert compare(report(), replace(report(), request=replace(report().request, turns=5, cold=1))).warnings == ()


def test_what_only_the_scenario_depends_on_is_warned_of_with_it_alone():
    old = five()
    assert compare(old, replace(old, request=replace(old.request, batch=3))).warnings == ()
    old = server()
    found = compare(old, replace(old, request=replace(old.request, p99_s=0.4796061)))
    assert found.warnings == ("another p99_s: 1, now 0.4796",)
    assert any(row.what == "turn, against diffusers 0.36, eager" for row in found.rows)


def test_a_picture_that_changed_and_a_system_that_went_are_noted():
    old = five()
    changed = replace(old.systems[2], changes_picture=True, max_levels=40, psnr_db=30.0)
    notes = compare(old, replace(old, systems=(*old.systems[:2], changed))).notes
    assert any("now differs from the reference" in line for line in notes)
    assert any("stable-diffusion.cpp: only in the old run" in line for line in notes)


def test_the_text_shows_what_changed_and_counts():
    shown = text(compare(run(1), run(2, slow=1.5)))
    assert "diffoundry, onnxruntime" in shown
    assert "slower" in shown.splitlines()[-1]
    assert any(line.strip().startswith("turn ") and line.endswith("slower") for line in shown.splitlines())
    same = text(compare(run(1), run(1)))
    assert same.splitlines()[-1].startswith("0 slower, 0 faster")
    assert "decoder" not in same


@pytest.mark.parametrize("name", list(ALL))
def test_a_report_is_as_fast_as_itself(name):
    found = compare(ALL[name](), ALL[name]())
    assert {row.verdict for row in found.rows} <= {"same"}
    assert not found.slower
    assert text(found)


def test_texts_of_files_are_shown_in_one_line_each():
    shown = text(compare(hostile(), replace(hostile(), date="x", systems=five().systems)))
    assert all(line.isprintable() for line in shown.splitlines())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 12, 30])
def test_the_interval_holds_the_median_and_narrows(count):
    values = [1 + 0.02 * i / count for i in range(count)]
    found = interval(values)
    assert found.low <= found.middle <= found.high
    assert found.high - found.low > 0
    if count >= 12:
        assert found.low > min(values) and found.high < max(values)
    else:
        assert found.low <= min(values) and found.high >= max(values)
