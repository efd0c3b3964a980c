"""HTML and SVG from values: every text is escaped, unless it is markup already."""

from __future__ import annotations

from html import escape

from .units import printable

_VOID = {"meta", "rect", "line", "circle", "path"}


class Markup(str):
    """Text that is markup, to be put in as it is."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """An element. attributes: by their names, `class_` for `class`, `_` for `-`; their values are escaped too."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    if name in _VOID and not children:
        return Markup(f"<{name}{given}>" if name == "meta" else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several elements and texts, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(printable(child)) for child in children))


def _value(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(printable(value))
