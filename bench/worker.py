"""Our process of a benchmark, which speaks the protocol of `systems.py`.

python -m diffoundry.bench.worker
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drawing import Drawer


def main() -> None:
    """Answer the questions on standard input, a JSON object a line, until it ends or is told to."""
    from ..common.machine import die_with_parent

    die_with_parent()
    # a library may print: its words must not come among the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    start = time.perf_counter()
    from . import drawing

    say({"ready": True, "seconds": {"import": time.perf_counter() - start}, "versions": drawing.versions()})
    drawer: Drawer | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "load":
            drawer = None  # what was loaded before goes first
        drawer, answer = _answered(drawer, asked)
        say(answer)
        if asked["do"] == "end":
            return


def _answered(drawer: Drawer | None, asked: dict[str, Any]) -> tuple[Drawer | None, dict[str, Any]]:
    """What is loaded after `asked`, and the answer to it."""
    from ..common.errors import DiffoundryError, reason
    from ..common.files import disk_error
    from ..common.machine import peak_memory
    from .drawing import Drawer

    try:
        if asked["do"] == "load":
            start = time.perf_counter()
            drawer = Drawer(asked)
            return drawer, {"ok": True, "seconds": {"load": time.perf_counter() - start}, "info": drawer.info()}
        if asked["do"] == "end":
            return drawer, {"ok": True, "peak_rss": peak_memory(os.getpid()), "peak_gpu": drawer and drawer.peak_gpu}
        if drawer is None:
            return None, _failed("nothing was loaded")
        return drawer, {"ok": True, **drawer.draw(asked, by_step=asked.get("by_step", False))}
    except DiffoundryError as error:
        return drawer, _failed(str(error))
    except MemoryError:
        return drawer, _failed("out of memory")
    except OSError as error:
        return drawer, _failed(str(disk_error(error)))
    except Exception as error:  # whatever a library raises: the others go on
        return drawer, _failed(f"{type(error).__name__}: {reason(error)}")


def _failed(why: str) -> dict[str, Any]:
    return {"ok": False, "error": " ".join(why.split())}


if __name__ == "__main__":
    main()
