"""What the chat template of a tokenizer makes of a text, rendered in a process of its own.

A template is a program of whoever made the checkpoint (Jinja): it may never end, or take all memory. Texts and template
come as JSON on standard input, and what is rendered leaves as JSON on standard output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError, reason
from ..common.machine import die_with_parent

_SECONDS = 30.0
"""With the start of the process; a template of a language model takes milliseconds."""
_MEMORY = 2 << 30
_LONGEST = 1_000_000
"""Characters of one rendered text."""
_REMEDY = "give the tokenizer that the model was published with"


def rendered(template: str, tokens: Mapping[str, Any], texts: Sequence[str], source: Path) -> list[str]:
    """Each text as its user says it first, with what makes a model answer after it, as transformers renders it.

    tokens: the special tokens, by the names that templates call them by. source: the folder that messages name.
    Raises `CheckpointError` for a template with a mistake, and for one that takes 30 s, 2 GiB or a million characters.
    """
    found = _rendered(json.dumps({"template": template, "tokens": dict(tokens), "texts": list(texts)}, default=str))
    if isinstance(found, str):
        raise CheckpointError(f"the chat template of the tokenizer in {source} {found}: {_REMEDY}")
    return found


@functools.cache
def _rendered(job: str) -> list[str] | str:
    """The texts, or what is wrong with the template."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=job.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=tempfile.gettempdir(),
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"is not rendered in {_SECONDS:.0f} s"
    try:
        answer: list[str] | str = json.loads(done.stdout)
    except ValueError:
        return f"cannot be rendered (its process ended with {done.returncode})"
    return answer


def main() -> None:
    """Render the texts on standard input."""
    die_with_parent()
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.load(sys.stdin)
    _limit_memory()
    answer: list[str] | str
    try:
        answer, _ = render_jinja_template(
            [[{"role": "user", "content": text}] for text in job["texts"]],
            chat_template=job["template"],
            add_generation_prompt=True,
            **{**job["tokens"], "enable_thinking": True},
        )
        if max(map(len, answer)) > _LONGEST:
            answer = f"makes more than {_LONGEST:,} characters of a short text"
    except MemoryError:
        answer = f"takes more than {_MEMORY >> 30} GiB of memory"
    except Exception as error:
        answer = f"cannot be rendered ({reason(error)})"
    json.dump(answer, sys.stdout)


def _limit_memory() -> None:
    """Where the system can, the process takes no more than what it has and `_MEMORY` bytes."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    main()
