"""`bench --compare OLD NEW`: what became slower or faster by more than the noise of both runs.

A change counts when the intervals of the two runs do not meet (`noise.interval`), and both have at least three values.
Where a peer that is the same in both
runs has become slower, or else the peaks of the machine have, the machine has: the new interval is stretched by that
factor, and a warning says so. Against such a peer our turns are also compared pair by pair, which a slower machine does
not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from . import units
from .figures import Figure, Unit, figures
from .noise import Interval, interval
from .report import OURS, Report, Settings, System
from .timing import median

Verdict = Literal["slower", "faster", "same"]
_LEAST = 0.05
"""A smaller change does not count: two processes of one program differ by so much, by where their memory lies."""
_LEAST_VALUES = 3
"""With fewer, such as one cold start, how much they vary is not known, and nothing is said of them."""
_SMALL = 0.01
"""Of a turn: a stage whose change is smaller does not count."""
_BUSY = 0.5
"""Processes a core that wait for it: a machine with more is warned of."""
_DRIFT = 0.03
"""A machine that differs by more is warned of."""


_OF_SCENARIO = ("scenario", "batch", "p99_s")
"""Of a request: what the turns do not depend on."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of both runs. name, title: of the system. what: the figure, as `turn` or `cold start, loaded`.

    factor: the new time over the old; of rates and ratios the old over the new. verdict: `same` within the noise.
    """

    name: str
    title: str
    what: str
    old: Interval
    new: Interval
    factor: float
    verdict: Verdict
    unit: Unit = "s"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two reports. warnings: why they do not quite compare. notes: what else is different. lost: ours has failed."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    lost: bool = False

    @property
    def slower(self) -> bool:
        """Whether a figure of ours became slower beyond the noise, or there is none any more."""
        return self.lost or any(row.verdict == "slower" for row in self.rows if row.name == OURS)


def compare(old: Report, new: Report) -> Comparison:
    """Hold each figure of `new` against the same of `old`: turns, stages, cold start and rates of each system."""
    differences = _machines(old, new)
    drift = () if differences else _drift(old, new)  # of another machine the difference is what is asked for
    rows = [
        row
        for system in new.systems
        if (before := old.system(system.name)) is not None
        for row in _system_rows(old, before, new, system, drift)
    ]
    warnings = (*differences, *_requests(old, new), *_loads(old, new), *_drift_warning(drift))
    lost = _has_turns(old.system(OURS)) and not _has_turns(new.system(OURS))
    return Comparison(tuple(rows), warnings, _notes(old, new), lost)


def _system_rows(
    old_report: Report, old: System, new_report: Report, new: System, drift: Sequence[float]
) -> Iterator[Row]:
    before, after = figures(old_report, old), figures(new_report, new)
    if new.name == OURS:
        same = _same_peers(old_report, new_report)
        before, after = before | _against(old_report, same), after | _against(new_report, same)
    turn = _turn(old) if old.turns else 0.0
    for what, figure in after.items():
        if what in before and min(*before[what].values, *figure.values) > 0:
            yield _row(new, what, before[what], figure, drift, _SMALL * turn if figure.of_turn else 0.0)


def _row(system: System, what: str, old: Figure, new: Figure, drift: Sequence[float], least: float) -> Row:
    a, b = interval(old.values), interval(new.values)
    factor = b.middle / a.middle if new.unit == "s" else a.middle / b.middle
    # a slower machine makes times longer and rates lower, and leaves ratios
    stretch = {"s": drift, "/s": [1 / each for each in drift], "×": []}[new.unit]
    enough = new.unit != "s" or min(len(old.values), len(new.values)) >= _LEAST_VALUES  # a rate is of many requests
    apart = enough and (b.low / max([1.0, *stretch]) > a.high or b.high / min([1.0, *stretch]) < a.low)
    verdict: Verdict = "same"
    if apart and abs(factor - 1) >= _LEAST and abs(b.middle - a.middle) >= least:
        verdict = "slower" if factor > 1 else "faster"
    return Row(system.name, units.marked(system), what, a, b, factor, verdict, new.unit)


def _against(report: Report, names: Sequence[str]) -> dict[str, Figure]:
    """Our turns against those of some peers, pair by pair."""
    return {
        f"turn, against {units.plain(each.title or each.name, 40)}": Figure(each.ratio.pairs, "×")
        for each in report.systems
        if each.name in names and each.ratio is not None and each.ratio.pairs
    }


def _same_peers(old: Report, new: Report) -> list[str]:
    """The peers that did the same in both runs, in the order of the new one."""
    if any(name not in _OF_SCENARIO for name, _ in _asked(old, new)):
        return []
    return [
        each.name
        for each in new.systems
        if each.name != OURS and (before := old.system(each.name)) is not None and _is_same(before, each)
    ]


def _drift(old: Report, new: Report) -> tuple[float, ...]:
    """By what factors the machine became slower: those of peers that are the same in both runs, else of its peaks."""
    peers = [(old.system(name), new.system(name)) for name in _same_peers(old, new)]
    if peers:
        return tuple(_turn(after) / _turn(before) for before, after in peers if before and after)
    a, b = old.machine.peaks, new.machine.peaks
    common = sorted(set(a.matmul_flops_per_s) & set(b.matmul_flops_per_s))
    pairs = [(a.matmul_flops_per_s[key], b.matmul_flops_per_s[key]) for key in common]
    if a.copy_bytes_per_s is not None and b.copy_bytes_per_s is not None:
        pairs.append((a.copy_bytes_per_s, b.copy_bytes_per_s))
    return tuple(before / after for before, after in pairs if before > 0 and after > 0)


def _turn(system: System) -> float:
    return median([turn.seconds for turn in system.turns])


def _is_same(old: System, new: System) -> bool:
    """Whether two runs of a peer did the same, and took a time that can be divided by."""
    same = (old.precision, old.versions, old.title) == (new.precision, new.versions, new.title)
    return same and bool(old.turns and new.turns) and all(turn.seconds > 0 for turn in (*old.turns, *new.turns))


def _has_turns(system: System | None) -> bool:
    return system is not None and bool(system.turns)


def _machines(old: Report, new: Report) -> list[str]:
    a, b = old.machine, new.machine
    gpus = [each.gpu.name if each.gpu else None for each in (a, b)]
    pairs = {"processor": (a.processor, b.processor), "number of cores": (a.cores, b.cores), "GPU": tuple(gpus)}
    return [_other(what, *pair) for what, pair in pairs.items() if pair[0] != pair[1]]


def _loads(old: Report, new: Report) -> list[str]:
    runs = {"old": old.machine, "new": new.machine}
    return [
        f"the machine was busy when the {name} run began: load {each.load:.1f} on {each.cores} cores"
        for name, each in runs.items()
        if each.load is not None and each.load >= _BUSY * each.cores
    ]


def _other(what: str, old: object, new: object) -> str:
    texts = ("none" if each is None else f"{each:.4g}" if isinstance(each, float) else str(each) for each in (old, new))
    return f"another {what}: {', now '.join(units.plain(each, 80) for each in texts)}"


def _asked(old: Report, new: Report) -> list[tuple[str, tuple[object, object]]]:
    """What was asked for differently, but for the numbers of turns and starts."""
    names = [field.name for field in fields(Settings) if field.name not in ("turns", "cold")]
    pairs = [(name, (getattr(old.request, name), getattr(new.request, name))) for name in names]
    return [(name, pair) for name, pair in pairs if pair[0] != pair[1]]


def _requests(old: Report, new: Report) -> list[str]:
    """What was asked for differently; the numbers of turns and starts may differ."""
    of_scenario = _OF_SCENARIO if old.request.scenario == new.request.scenario != "single" else ("scenario",)
    lines = [_other(name, *pair) for name, pair in _asked(old, new) if name not in _OF_SCENARIO or name in of_scenario]
    for system in new.systems:
        before = old.system(system.name)
        if before is not None and before.precision != system.precision and system.name != OURS:
            lines.append(_other(f"precision of {units.plain(system.name, 40)}", before.precision, system.precision))
    if old.bundle.family != new.bundle.family or old.bundle.name != new.bundle.name:
        lines.append(_other("bundle", old.bundle.name, new.bundle.name))
    lines += [f"the {name} run was interrupted" for name, each in (("old", old), ("new", new)) if not each.complete]
    return lines


def _drift_warning(drift: Sequence[float]) -> list[str]:
    slowest, fastest = max([1.0, *drift]), min([1.0, *drift])
    if slowest / fastest <= 1 + _DRIFT:
        return []
    found = [f"up to {100 * (slowest - 1):.0f} % slower"] if slowest > 1 + _DRIFT else []
    found += [f"up to {100 * (1 / fastest - 1):.0f} % faster"] if 1 / fastest > 1 + _DRIFT else []
    return [f"the machine itself was {' and '.join(found)} in the new run: changes of that size are not counted"]


def _notes(old: Report, new: Report) -> tuple[str, ...]:
    lines = []
    if old.bundle.sha256 != new.bundle.sha256:
        lines.append("the bundle was compiled anew or differs")
    for system in new.systems:
        title, before = units.plain(system.title or system.name, 60), old.system(system.name)
        if before is None:
            lines.append(f"{title}: only in the new run")
            continue
        if system.error and not before.error:
            lines.append(f"{title} failed: {units.plain(system.error)}")
        if system.changes_picture != before.changes_picture:
            lines.append(
                f"{title}: its picture {'now differs from' if system.changes_picture else 'is again'} the reference"
            )
        lines += _versions(title, before.versions, system.versions)
    lines += [
        f"{units.plain(each.title or each.name, 60)}: only in the old run"
        for each in old.systems
        if new.system(each.name) is None
    ]
    return tuple(lines)


def _versions(title: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [
        f"{title}: {units.plain(name, 40)} {units.plain(old[name], 40)}, now {units.plain(new[name], 40)}"
        for name in sorted(set(old) & set(new))
        if old[name] != new[name]
    ]


def text(comparison: Comparison) -> str:
    """The comparison for a terminal: warnings, notes, each turn and what changed, and a last line that counts."""
    lines = [f"warning: {each}" for each in comparison.warnings] + [f"note: {each}" for each in comparison.notes]
    shown = [row for row in comparison.rows if row.what == "turn" or row.verdict != "same"]
    lines += _table(shown) if shown else []
    counts = {
        verdict: sum(row.verdict == verdict for row in comparison.rows) for verdict in ("slower", "faster", "same")
    }
    lines.append(
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same within the noise of both runs"
    )
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    """The rows of each system under its title, in columns."""
    cells = [("", "old", "new", "time", "")]
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1].name != row.name:
            cells.append((row.title, "", "", "", ""))
        cells.append((f"  {row.what}", _shown(row, row.old), _shown(row, row.new), f"× {row.factor:.2f}", row.verdict))
    first, *others = (max(len(line[i]) for line in cells) for i in range(4))
    return [
        "  ".join(
            [line[0].ljust(first), *(cell.rjust(n) for cell, n in zip(line[1:4], others, strict=True)), line[4]]
        ).rstrip()
        for line in cells
    ]


def _shown(row: Row, found: Interval) -> str:
    def write(value: float) -> str:
        return units.seconds(value) if row.unit == "s" else f"{units.digits(value)} {row.unit}"

    return f"{write(found.middle)} ({write(found.low)} to {write(found.high)})"
