"""A server under random arrivals for a long time: is each answer the right picture, is all freed, does memory stay?

python -m diffoundry.bench.soak build/pico.bundle --minutes 60 --json soak.json

It starts `diffoundry serve` as a process of its own and asks it over HTTP. First it draws thirty distinct requests in
this process, as `diffoundry run` would, and finds out how many requests a second the server answers. Then these
requests come at random: whole answers, streams with partial pictures, jobs that are asked for or watched, some of
which are cancelled or left half-way, and requests that are damaged. Every picture that comes back is held against the
one that was drawn here. It ends with an error where an answer was wrong, something was left in the server, or the
memory of the server grew by more than 3 % after its first sixth of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import DiffoundryError
from ..runtime.pipeline import load
from .asking import STEPS, WAYS, Case, Client, Server, Tally, cases

_SHARES = (0.6, 0.25, 0.15)
"""Of requests of 4, 20 and 50 steps."""
_GROWTH = 0.03
_AT_ONCE = 24
"""The most requests on their way."""
_WARM = 96
"""Requests by which the capacity is measured."""
_GAUGES = ("waiting", "moving", "decoding")


def draw(known: Sequence[Case], rng: np.random.Generator) -> Case:
    """One of the requests, by the shares of steps."""
    steps = int(rng.choice(STEPS, p=_SHARES))
    own = [case for case in known if case.steps == steps]
    return own[int(rng.integers(len(own)))]


def capacity(client: Client, known: Sequence[Case], rng: np.random.Generator) -> float:
    """Requests a second that the server answers where as many come as it takes."""
    coming = [draw(known, rng) for _ in range(_WARM)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda case: client.send("whole", case), coming[: _WARM // 3]))  # engines and caches are warm
        start = time.monotonic()
        list(pool.map(lambda case: client.send("whole", case), coming[_WARM // 3 :]))
    return (_WARM - _WARM // 3) / (time.monotonic() - start)


def arrive(
    server: Server,
    client: Client,
    tally: Tally,
    known: Sequence[Case],
    rate: float,
    seconds: float,
    rng: np.random.Generator,
) -> int:
    """Let requests come at random, `rate` a second on average. Returns how many came; all of them have ended.

    Raises `BenchError` where the server ends meanwhile.
    """
    ways, shares = list(WAYS), np.array(list(WAYS.values())) / sum(WAYS.values())
    start, at, count = time.monotonic(), 0.0, 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while (at := at + float(rng.exponential(1 / rate))) < seconds:
            time.sleep(max(0.0, start + at - time.monotonic()))
            server.check()
            while tally.at_once >= _AT_ONCE:  # where the machine has become slower
                time.sleep(0.05)
            pool.submit(client.send, str(rng.choice(ways, p=shares)), draw(known, rng))
            count += 1
    return count


class Memory:
    """The memory of the server over time: seconds since the begin, bytes, and bytes that are in no file."""

    def __init__(self, server: Server, every: float) -> None:
        self.samples: list[tuple[float, float, float]] = []
        self._server, self._every, self._ended = server, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._begin = time.monotonic()
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            with contextlib.suppress(OSError):  # `arrive` finds out where the server has ended
                found = self._server.metrics()["process_resident_memory_bytes"]
                self.samples.append((time.monotonic() - self._begin, found, self._server.anonymous()))

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def by_part(self, parts: int) -> list[float]:
        """The median of each of so many parts of the time."""
        last = self.samples[-1][0] if self.samples else 0.0
        found: list[list[float]] = [[] for _ in range(parts)]
        for at, size, _ in self.samples:
            found[min(parts - 1, int(at / last * parts))].append(size)
        return [statistics.median(each) for each in found if each]


def main() -> None:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=0.5, help="of what the server can answer")
    parser.add_argument("--sizes", default="64x64,96x64")
    parser.add_argument("--control", help="a control of the bundle")
    parser.add_argument("--lora", help="a LoRA, of a bundle that takes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("options", nargs="*", help="after --: options of diffoundry serve")
    asked = parser.parse_args()
    sizes = [(int(width), int(height)) for width, height in (each.split("x") for each in asked.sizes.split(","))]
    try:
        known = cases(load(asked.bundle, threads=1), sizes, asked.control, asked.lora)
    except DiffoundryError as error:
        parser.exit(1, f"Error: {' '.join(str(error).split())}\n")
    print(f"{len(known)} distinct requests drawn", flush=True)
    loras = ["--lora", f"lora={asked.lora}"] if asked.lora else []
    command = [sys.executable, "-m", "diffoundry", "serve", asked.bundle, "--port", "0", "--warm", "--threads", "1"]
    server, tally, rng = Server([*command, *loras, *asked.options]), Tally(), np.random.default_rng(asked.seed)
    try:
        found = run(server, tally, known, asked.minutes * 60, asked.load, rng)
        found["status"] = server.end()
    except DiffoundryError as error:
        parser.exit(1, f"Error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Error: stopped before the time was over\n")
    finally:
        server.end()
    found["errors"] = server.errors
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    sys.exit(0 if verdict(found) else 1)


def run(
    server: Server, tally: Tally, known: Sequence[Case], seconds: float, load: float, rng: np.random.Generator
) -> dict[str, Any]:
    """All of it, as JSON values."""
    client = Client(server, tally, int(rng.integers(1 << 31)))
    most = capacity(client, known, rng)
    print(f"it answers {most:.1f} requests/s; now {load:.0%} of it for {seconds / 60:g} minutes", flush=True)
    for seconds_of in tally.seconds.values():
        seconds_of.clear()
    memory = Memory(server, max(0.5, seconds / 720))
    count = arrive(server, client, tally, known, load * most, seconds, rng)
    memory.end()
    time.sleep(1.0)
    counted = server.metrics()
    parts = memory.by_part(12)
    return {
        "capacity_per_s": most,
        "requests": count,
        "done": dict(tally.done),
        "pictures": dict(tally.pictures),
        "wrong": tally.wrong,
        "left": {name: counted[f"diffoundry_{name}_images"] for name in _GAUGES},
        "metrics": {name: value for name, value in counted.items() if not name.endswith(("_bucket", "_created"))},
        "p99_ms": {str(n): float(np.percentile(each, 99)) * 1000 for n, each in tally.seconds.items() if each},
        "memory": memory.samples,
        "memory_parts": parts,
        "growth": max(parts[2:]) / parts[2] - 1 if len(parts) > 2 else 0.0,
    }


def verdict(found: dict[str, Any]) -> bool:
    """Show what was found. Returns whether all is as it should be."""
    print(f"{found['requests']} requests: {', '.join(f'{n} {way}' for way, n in sorted(found['done'].items()))}")
    print(f"pictures: {', '.join(f'{n} {what}' for what, n in found['pictures'].items())}")
    print(f"p99 in ms by steps: {', '.join(f'{steps}: {ms:.0f}' for steps, ms in found['p99_ms'].items())}")
    print("memory in MiB by twelfths of the time:", *(f"{each / 2**20:.1f}" for each in found["memory_parts"]))
    print(f"growth after the second twelfth: {found['growth']:.1%}, of which {_GROWTH:.0%} are allowed")
    print(f"left in the server: {', '.join(f'{n:g} {what}' for what, n in found['left'].items())}")
    for line in (*found["wrong"][:20], *found["errors"][:20]):
        print("wrong:", line)
    whole = not (found["wrong"] or found["errors"] or any(found["left"].values()))
    return whole and found["growth"] <= _GROWTH


if __name__ == "__main__":
    main()
