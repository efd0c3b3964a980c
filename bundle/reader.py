"""The one reader of JSON files: a value is held against a dataclass, type by type, and becomes one.

A field may have the type `str`, `int`, `float` (finite), `bool`, `Any`, another dataclass, `tuple[T, ...]`,
`tuple[A, B]`, `dict[str, T]`, `Literal`, a union, or one of these with `Rule`s: `Annotated[int, Rule(…)]`. What spans
several fields a dataclass checks in `__post_init__`, with `ValueError`. Keys that no field has are left alone, so that
an older version reads what a newer one adds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..common.checks import is_finite, is_whole

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
_LONGEST = 60


class FieldError(ValueError):
    """One field is wrong: `components.unet.files must be an object, found a list`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A condition on a value; `says` goes on with "must", as in "be at least 1"."""

    holds: Callable[[Any], bool]
    says: str


def read(kind: type[T], value: Any, path: str = "") -> T:
    """`value`, as `json.loads` gives it, as a `kind`. path: of the value in its file.

    Raises `FieldError` that names the first field that is wrong.
    """
    return cast(T, _read(kind, value, path))


def fits(kind: type[Any], value: Any) -> bool:
    """Whether `value` can be read as a `kind`."""
    try:
        read(kind, value)
    except FieldError:
        return False
    return True


def _read(kind: Any, value: Any, path: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        result = _read(parts[0], value, path)
        for rule in parts[1:]:
            _need(rule.holds(result), path, rule.says, value)
        return result
    if origin in (Union, types.UnionType):
        return _read_union(parts, value, path)
    if origin is Literal:
        _need(isinstance(value, (str, int)) and value in parts, path, f"be one of {', '.join(map(str, parts))}", value)
        return value
    if origin is tuple:
        _need(isinstance(value, (list, tuple)), path, "be a list", value)
        kinds = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        _need(len(kinds) == len(value), path, f"have {len(kinds)} entries", value)
        return tuple(_read(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict or dataclasses.is_dataclass(kind):
        _need(isinstance(value, dict), path, "be an object", value)
        if origin is dict:
            return {key: _read(parts[1], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
        return _read_object(kind, value, path)
    fits = is_finite(value) if kind is float else is_whole(value) if kind is int else isinstance(value, kind)
    _need(fits, path, f"be {_WORDS[kind]}", value)
    return kind(value)


def _read_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """As the first kind that fits; where none does, the last one says what is wrong."""
    if value is None and types.NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(FieldError):
            return _read(kind, value, path)
    return _read(last, value, path)


def _read_object(kind: Any, value: dict[str, Any], path: str) -> Any:
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        inner = f"{path}.{field.name}".lstrip(".")
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], inner)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise FieldError(f"{inner} is missing")
    try:
        return kind(**found)
    except ValueError as error:
        raise FieldError(f"{path}: {error}" if path else str(error)) from None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _need(holds: bool, path: str, says: str, value: Any) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
        raise FieldError(f"{path or 'it'} must {says}, found {shown}")
