"""What a user's own module holds, by `module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import DiffoundryError, reason


def imported(name: str, what: str, due: str) -> Any:
    """What `module:name` names. what, due: for messages, what it is called and what it is to be.

    Raises `DiffoundryError` for what cannot be imported."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise DiffoundryError(f"{what} {name:.200} is not of the form module:NAME: write it so")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything when it is imported, or be a script
        raise DiffoundryError(
            f"{what} {name:.200} cannot be loaded ({reason(error)}): name {due} of a module that Python finds, in "
            "PYTHONPATH for instance"
        ) from None
