"""HTML and SVG from values: every text is escaped, unless it is markup already; and pages that need nothing else."""

from __future__ import annotations

from html import escape

_VOID = {"meta", "rect", "line", "circle", "path", "img"}
_UNCLOSED = {"meta", "img"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #fff; --line: #d5d9e0; --band: #f4f6f9;
  --bad: #a40000; --before: #ddaa33; --first_step: #bb5566; --steps: #004488; --after: #77ccee; --merged: #b9bcc2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b4; --paper: #16181c; --line: #3a3f48;
  --band: #1f2228; --bad: #ff8f8f; --steps: #5a9bd8; --after: #a5e0f5; --first_step: #d4717f; --merged: #6d7280; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0 0 .3em; } h2 { font-size: 1.1em; margin: 2em 0 .5em; }
p { margin: .4em 0; } .soft, figcaption { color: var(--soft); font-size: .9em; } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85em; }
th, td { padding: .35em .45em; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  font-variant-numeric: tabular-nums; } thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; min-width: 12em; overflow-wrap: anywhere; } tbody th { font-weight: 400; }
.ours > * { font-weight: 600; background: var(--band); }
.short { white-space: nowrap; } .list td { text-align: left; overflow-wrap: anywhere; }
pre { background: var(--band); border: 1px solid var(--line); padding: .7em 1em;
  white-space: pre-wrap; font-size: .9em; }
figure { margin: 1em 0 1.5em; overflow-x: auto; }
svg { width: 100%; min-width: 34rem; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
.part { stroke: var(--paper); stroke-width: 1; }
.before { fill: var(--before); } .first_step { fill: var(--first_step); }
.steps { fill: var(--steps); } .after { fill: var(--after); } .merged { fill: var(--merged); }
.end { text-anchor: end; } .middle { text-anchor: middle; } .axis { stroke: var(--line); }
.whisker { stroke: var(--steps); } .box { fill: var(--band); stroke: var(--steps); }
.turn { fill: var(--steps); opacity: .7; }
.far { fill: var(--bad); }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff;
  --bad: #a40000; --steps: #004488; --after: #77ccee; --first_step: #bb5566; --merged: #b9bcc2; }
  body { padding: 0; font-size: 10px; } th, td { padding: .25em .4em; } th:first-child { min-width: 9em; }
  h2 { break-after: avoid; } figure, tr, pre { break-inside: avoid; } .wide, figure { overflow: visible; }
  svg { min-width: 0; } @page { margin: 12mm; } }
"""


class Markup(str):
    """Text that is markup, to be put in as it is."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """An element. attributes: by their names, `class_` for `class`, `_` for `-`; their values are escaped too."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    if name in _VOID and not children:
        return Markup(f"<{name}{given}>" if name in _UNCLOSED else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several elements and texts, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(printable(child)) for child in children))


def document(title: str, *body: str) -> str:
    """A page that needs no network and no scripts, for a browser or for paper."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def printable(text: object) -> str:
    """`text` without characters that cannot be shown: controls, half surrogates, changes of direction."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in str(text))


def _value(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(printable(value))
