"""Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing under --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..common.progress import Progress

_COUNT = "0123456789/ "
"""A text that ends in a count says how far a stage is."""


@contextmanager
def progress(title: str, *, shown: bool = True, every: float = 5.0) -> Iterator[Progress]:
    """Yield a progress callback. Plain lines come every so many seconds, and when more than a count changes.

    done: whole stages, and the part of the one that is going on.
    """
    if not shown:
        yield lambda text, done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda text, done, total: bar.update(
                task, description=f"{title}: {text}", completed=done, total=total
            )
    else:
        start = time.monotonic()
        shown_words, shown_at = "", start - every

        def plain(text: str, done: float, total: int) -> None:
            nonlocal shown_words, shown_at
            now = time.monotonic()
            words = text.rstrip(_COUNT)
            if words != shown_words or now - shown_at >= every or done == total:
                shown_words, shown_at = words, now
                print(f"{title}: {text} {int(done)}/{total} ({now - start:.0f} s)", file=sys.stderr, flush=True)

        yield plain
