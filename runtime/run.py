"""A run on its way: what it yields after each step, and what it has made in the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..common.arrays import Array
from ..common.errors import RequestError
from .conditions.condition import Job
from .loaded import Form
from .loop.sample import Sample

Callback = Callable[[int, int, Array], object]
"""`callback(step, total, latents)` after each step; returning False stops the run."""


@dataclass(frozen=True, slots=True)
class Result:
    """Images with what made them: image i came from `seeds[i]` alone. There are none where latents were asked for.

    truncated: the parts of the prompts that did not fit the text encoder's window. seconds: time by stage.
    latents: the final latents, float32 (count, C, H/downscale, W/downscale).
    """

    images: list[Image.Image]
    seeds: list[int]
    request: dict[str, Any]
    truncated: dict[str, str]
    seconds: dict[str, float]
    latents: Array


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after a step: `step` of `total`, counted from 1.

    latents: float32 (N, C, H/downscale, W/downscale), a copy, of the images that are made together; where they differ
    in their steps, those that are done have their final latents.
    """

    step: int
    total: int
    latents: Array


@dataclass(frozen=True, slots=True)
class Ready:
    """A job with what its rows start from: a sample for each of its images. form: the denoiser that draws them.

    truncated: see `Result`.
    """

    job: Job
    samples: list[Sample]
    truncated: dict[str, str]
    form: Form


class Run(Iterator[Progress]):
    """Yields a `Progress` after each step, and has the `result` when there are no more.

        run = pipe.steps(request)
        for progress in run:
            …
        run.result.images[0]

    Nothing runs between two steps, so it can be left at any time; `close` gives back at once what it holds.
    """

    def __init__(self, steps: Generator[Progress, None, list[Result]]) -> None:
        self._steps = steps
        self._results: list[Result] | None = None

    def __next__(self) -> Progress:
        try:
            return next(self._steps)
        except StopIteration as end:
            self._results = end.value if self._results is None else self._results
            raise StopIteration from None

    @property
    def results(self) -> list[Result]:
        """The result of each request. Raises `RequestError` while steps are left, and when they were never made."""
        if self._results is None:
            raise RequestError("the run has no result before its last step: iterate to the end")
        return self._results

    @property
    def result(self) -> Result:
        """As `results`, of the only request."""
        return self.results[0]

    def close(self) -> None:
        """End the run. The pipeline is free for others."""
        self._steps.close()
