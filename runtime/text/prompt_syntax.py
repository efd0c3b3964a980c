"""The prompt syntax of weights, blends and conjunctions: text to fragments and their weights.

    word++  word-            1.1 for each +, 0.9 for each -
    (several words)1.3       a number, or signs; what is nested is multiplied
    "several words"++        the same; quotes without a weight are text
    ("a", "b").blend(7, 3)   one embedding, the mean of both; `no_normalize` as the last argument takes the plain sum
    ("a", "b").and(1, 0.5)   both embeddings one after the other

A sign is an operator where whitespace, punctuation or the end follows: `t-shirt` and `c++11` are words. Parentheses
without a weight vanish. A backslash makes any of ``\\ ( ) [ ] < " + - , . :`` literal, and the words BREAK and AND.
The syntax is that of compel (github.com/damian0815/compel) without `.swap`, `.attend` and `withLora`. What reads as the
syntax of stable-diffusion-webui is refused with ours in its place: (word:1.3), ((word)), [word], <lora:…>, BREAK, AND.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...common.errors import RequestError

_PLUS, _MINUS = 1.1, 0.9
LARGEST_WEIGHT = 100.0
"""Images break above 2; this only keeps float32 embeddings finite."""
_SMALLEST_SUM = 1e-6
_MOST_SIGNS = 1000  # far beyond LARGEST_WEIGHT, and 1.1 ** 1000 is still a float

_DEEPEST = 100
"""Every level multiplies all that is inside it: this keeps long prompts fast."""

_SPACE = " \t\r\n"
_SPECIAL = r'\\()\[\]<"+\-,.:'
_ESCAPED = re.compile(rf"\\([{_SPECIAL}]|(?:BREAK|AND)\b)")
_UNIT = rf'(?:\\[{_SPECIAL}]|\\(?![{_SPECIAL}])|[^\s()",.+\-\\])'
_BOUNDARY = r'(?=[\s()",.;:!?\]}]|\Z)'
_POINT = r"(?<=[0-9])\.(?=[0-9])"
_QUOTED = rf'"((?:{_UNIT}|[\s(),.+-])*)"'
_SIGNS = r"\++|-+"
_NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_TOKEN = re.compile(
    r"(?P<unsupported>\.(?:swap|attend|blend|and)\(|withLora\(|useLora\()"
    rf"|(?P<open>\()|(?P<close>\)(?P<weight>{_SIGNS}|{_NUMBER})?)"
    rf"|(?P<quoted>{_QUOTED}(?=(?:{_SIGNS}|{_NUMBER}){_BOUNDARY})(?P<factor>{_SIGNS}|{_NUMBER}))"
    rf"|(?P<weighted>(?P<word>{_UNIT}(?:{_UNIT}|{_POINT}|[+-]+(?![+-])(?!{_BOUNDARY}))*)(?P<signs>{_SIGNS}){_BOUNDARY})"
    rf"|(?P<plain>(?:{_UNIT}|{_POINT}|[+-])+|.)|(?P<end>\Z)",
    re.DOTALL,
)
_AFTER_WEIGHT = re.compile(r"[\w+-]|\.[0-9]")
_COLON_WEIGHT = re.compile(r"(?<!\\):\s*[+-]?(?:[0-9]+|([0-9]*\.[0-9]+))\s*\Z")
_COLON_REACH = 24
"""How many characters before ")" are searched for a weight like ":1.3"."""
_COMBINATION = re.compile(
    rf"\s*\((?P<parts>\s*{_QUOTED}\s*(?:,\s*{_QUOTED}\s*)*)\)"
    r"\s*\.(?P<operator>blend|and)\s*\((?P<arguments>[^()]*)(?P<close>\)?)"
)
_ARGUMENT = re.compile(rf"[+-]?(?:{_NUMBER})\Z")
_FOREIGN = re.compile(r"\\.|(\[|<(?i:lora|lyco|hypernet):|\b(?:BREAK|AND)\b)", re.DOTALL)
"""What stable-diffusion-webui reads as syntax, and a backslash with what it makes literal."""
_OURS = {
    "BREAK": r'begins a window in other tools: write ("one part", "another").and() here, or \BREAK for the word',
    "AND": r'joins two prompts in other tools: write ("one", "another").blend(1, 1) here, or \AND for the word',
    "[": r"lowers the weight in other tools: write (words)0.9 or word- here, or \[ for a literal bracket",
    "[:": r"changes the prompt between steps in other tools, and not here: write one text, or \[ for a literal bracket",
    "<": r"loads a network in other tools: fuse it into the checkpoint and leave this out, or write \< if it is text",
    "((": r"raises the weight in other tools: write (words)1.21 or word++ here, or \( for a literal parenthesis",
}
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Fragment:
    """Text, without syntax, and the weight of each of its tokens; 1 is the text as it is."""

    text: str
    weight: float


Fragments = tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts of a prompt, each its fragments in order, () for an empty one, and the weights of the parts.

    Its embedding is the sum of the parts', each times its weight; the weights sum to 1 unless `no_normalize` was asked.
    joined: `.and()`, the parts' embeddings one after the other, each times its weight as seen from the empty prompt.
    """

    parts: tuple[Fragments, ...]
    weights: tuple[float, ...] = (1.0,)
    joined: bool = False


def parse(text: str, name: str = "prompt") -> Prompt:
    """What a prompt says. One without `.blend()` or `.and()` has one part.

    Neighbours of one weight are one fragment, so that text without syntax comes back as it is, less outer whitespace.
    Raises `RequestError` with the place in `name` for unbalanced parentheses, unclear or too large weights, operators
    that are not supported, and the syntax of other tools.
    """
    try:
        _refuse_foreign(text)
        match = _COMBINATION.match(text)
        return Prompt((_fragments(text, 0, len(text)),)) if match is None else _combination(text, match)
    except RequestError as error:
        raise RequestError(f"{name}{error}") from None


def _combination(text: str, match: re.Match[str]) -> Prompt:
    """The `.blend()` or `.and()` that the text begins as."""
    name, begin = f".{match['operator']}()", match.start("arguments") - 1
    if not match["close"]:
        raise _refusal(text, begin, f"is not closed: end {name} with )")
    if text[match.end() :].strip():
        raise _refusal(text, match.end(), f"follows {name}, which must be the whole prompt")
    parts = tuple(_fragments(text, *part.span(1)) for part in re.compile(_QUOTED).finditer(text, *match.span("parts")))
    arguments = [argument.strip() for argument in match["arguments"].split(",")]
    joined = name == ".and()"
    is_sum = not joined and arguments[-1] == "no_normalize"
    numbers = arguments[:-1] if is_sum else arguments
    if not any(numbers):
        numbers = ["1"] * len(parts)
    for number in numbers:
        if not _ARGUMENT.match(number) or abs(float(number)) > LARGEST_WEIGHT:
            remedy = f"write a number up to {LARGEST_WEIGHT:g} for each part, with commas"
            raise _refusal(text, begin, f"holds {_shown(number)}: {remedy}")
    if len(numbers) != len(parts):
        raise _refusal(text, begin, f"gives {len(numbers)} weights to {len(parts)} parts: give each one, or none")
    weights = [float(number) for number in numbers]
    total = 1.0 if joined or is_sum else math.fsum(weights)
    if abs(total) < _SMALLEST_SUM:
        raise _refusal(text, begin, "sums to 0: change a weight, or add no_normalize after the last one")
    return Prompt(parts, tuple(weight / total for weight in weights), joined)


def _fragments(text: str, start: int, end: int) -> Fragments:
    """The fragments of text[start:end], neighbours of one weight joined by a space."""
    joined: list[Fragment] = []
    for fragment in _spans(text, start, end):
        words = fragment.text
        if not fragment.weight <= LARGEST_WEIGHT:
            found = f"holds a weight above {LARGEST_WEIGHT:g}, of {_shown(words)}: take a smaller one"
            raise _refusal(text, start, found)
        if joined and math.isclose(joined[-1].weight, fragment.weight):  # products of the same weights in any order
            words = f"{joined.pop().text} {words}"
        joined.append(Fragment(words, fragment.weight))
    return tuple(joined)


def _spans(text: str, start: int, end: int) -> list[Fragment]:
    """The fragments of text[start:end], one for each change of syntax, times the weights of their groups."""
    groups: list[tuple[int, list[Fragment]]] = [(-2, [])]  # where each open one begins, and its fragments
    bare: dict[tuple[int, int], int] = {}  # by where a group begins and ends: how deep it is nested without a weight
    plain = start  # where the text that is not yet in a fragment began
    for token in _TOKEN.finditer(text, start, end):
        kind, at = token.lastgroup, token.start()
        if kind == "plain":
            continue
        if words := text[plain:at].strip(_SPACE):
            groups[-1][1].append(Fragment(_unescaped(words), 1.0))
        plain = token.end()
        inner: list[Fragment] = []
        weight = 1.0
        if kind == "unsupported":
            raise _refusal(text, at, _why_unsupported(token[0].strip(".(")))
        if kind == "open":
            if len(groups) > _DEEPEST:
                raise _refusal(text, at, f"is more than {_DEEPEST} parentheses deep: leave some out")
            groups.append((at, []))
        elif kind == "close":
            if len(groups) == 1:
                raise _refusal(text, at, r"closes a parenthesis that was never opened: write \) for a literal one")
            begin, inner = groups.pop()
            weight = _weight(text, token, "weight")
            _refuse_colon_weight(text, begin, at, weighted=bool(token["weight"]))
            around = 0 if token["weight"] else 1 + bare.get((begin + 1, at - 1), 0)
            if around > 1 and not (groups[-1][0] == begin - 1 and text[plain : plain + 1] == ")"):
                raise _refusal(text, begin, _OURS["(("])
            bare[begin, at] = around
        elif kind == "quoted":
            inner = _spans(text, at + 1, token.start("factor") - 1)
            weight = _weight(text, token, "factor")
        elif kind == "weighted":
            inner, weight = [Fragment(_unescaped(token["word"]), 1.0)], _of_signs(token["signs"])
        groups[-1][1].extend(Fragment(fragment.text, fragment.weight * weight) for fragment in inner)
    if len(groups) > 1:
        raise _refusal(text, groups[-1][0], r"opens a parenthesis that is never closed: write \( for a literal one")
    return groups[0][1]


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _weight(text: str, token: re.Match[str], group: str) -> float:
    """The weight that a group of the token holds, 1 if there is none."""
    weight = token[group]
    if not weight:
        return 1.0
    after = _AFTER_WEIGHT.match(text, token.end(), token.endpos)
    if after and not (weight[0] in "+-" and after[0].isalpha()):
        remedy = "write a number like 1.3, or + or - signs, then a space"
        raise _refusal(text, token.start(group), f"is an unclear weight: {remedy}")
    return _of_signs(weight) if weight[0] in "+-" else float(weight)


def _of_signs(signs: str) -> float:
    return (_PLUS if signs[0] == "+" else _MINUS) ** min(len(signs), _MOST_SIGNS)


def _refuse_foreign(text: str) -> None:
    for found in _FOREIGN.finditer(text):
        if syntax := found[1]:
            if syntax == "[":
                inside = text[found.start() : text.find("]", found.start())]
                syntax = "[:" if ":" in inside or "|" in inside else "["
            raise _refusal(text, found.start(), _OURS.get(syntax, _OURS["<"]))


def _refuse_colon_weight(text: str, start: int, end: int, weighted: bool) -> None:
    """Refuse (words:1.3), and (words:2) where no weight of ours follows."""
    weight = _COLON_WEIGHT.search(text[max(start, end - _COLON_REACH) : end])
    if weight and not (weighted and weight[1] is None):
        raise _refusal(text, start, r"has its weight inside: write (words)1.3, or \: for a literal colon")


def _why_unsupported(name: str) -> str:
    if name in ("blend", "and"):
        return f'is in the wrong place: ("one prompt", "another").{name}() must be the whole prompt, with double quotes'
    remedy = "write (words)1.3 instead" if name == "attend" else "leave it out"
    return f"is not supported: {remedy}, or write a backslash before the parenthesis if it is text"


def _refusal(text: str, at: int, reason: str) -> RequestError:
    """What is wrong, without the name of the prompt."""
    return RequestError(f", character {at + 1}: {_shown(text[at:])} {reason}")


def _shown(text: str) -> str:
    return repr(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))
