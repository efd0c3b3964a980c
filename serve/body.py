"""The body of a request: JSON or a form, as one mapping of names to values."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .errors import FieldError, Refusal
from .pictures import Upload

_MOST_FILES, _MOST_FIELDS, _LARGEST_FIELD = 32, 200, 8 << 20
_MOST_BRACKETS = 3
_NAME = re.compile(r"(\w{1,64})((?:\[\w{0,64}\])*)")
_TEXTS = frozenset(
    {
        *("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"),
        *("model", "size", "response_format", "output_format", "background", "quality", "style", "moderation"),
        *("user", "safety_identifier", "input_fidelity", "scheduler", "rng", "resize", "decoder", "guidance_mode"),
        *("image", "mask", "mask_image", "name", "output"),
    }
)
"""What a form says as it is meant. Everything else in it is JSON, such as 7, true or [0, 0.5]."""


class NoNumberError(ValueError):
    """What Python's reader takes for a number and JSON does not."""


async def read_body(request: Request) -> dict[str, Any]:
    """The fields of a request; files in it are `Upload`. Raises `Refusal` and `FieldError` for what cannot be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return read_json(await request.body())
    if kind == "multipart/form-data":
        return await _form(request)
    found = repr(kind) if kind else "no content-type"
    raise Refusal(415, f"the body must be application/json or multipart/form-data, found {found:.80}")


def read_json(data: bytes) -> dict[str, Any]:
    """An object. Raises `Refusal` for anything else, for one name twice, and for NaN."""
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except FieldError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, NoNumberError)):
            reason = "a number in it has too many digits"
        raise Refusal(400, f"the body is no JSON: {reason:.200}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, found {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FieldError(name[:64], f"{name!r:.80} is given twice: give it once")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise NoNumberError(f"{name} is no JSON number")


async def _form(request: Request) -> dict[str, Any]:
    try:
        form = await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=_LARGEST_FIELD)
    except HTTPException as error:
        raise Refusal(400, f"the form cannot be read: {error.detail:.200}") from None
    except (KeyError, ValueError, UnicodeDecodeError):  # what the parser says of a boundary or a header
        raise Refusal(400, "the form cannot be read: its boundary or a header is damaged") from None
    fields: dict[str, Any] = {}
    async with _closing(form):
        for key, value in form.multi_items():
            _put(fields, key, Upload(await value.read()) if isinstance(value, UploadFile) else value)
    return fields


class _closing:
    """Closes the files of a form, whatever happens."""

    def __init__(self, form: Any) -> None:
        self._form = form

    async def __aenter__(self) -> None:
        return

    async def __aexit__(self, *_: object) -> None:
        await self._form.close()


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    """Set `name`, `name[]`, `name[key]` or `name[][key]`, as clients write lists and objects in forms."""
    found = _NAME.fullmatch(key)
    parts = [] if found is None else re.findall(r"\[(\w*)\]", found[2])
    if found is None or len(parts) > _MOST_BRACKETS:
        raise FieldError(key[:64], f"{key!r:.80} is no name of a field")
    holder: Any = fields
    for part, inner in zip([found[1], *parts], [*parts, None], strict=True):
        if inner is None:
            _set(holder, part, _typed(next(name for name in [*reversed(parts), found[1]] if name), value), key)
        else:
            holder = _inner(holder, part, [] if inner == "" else {}, inner, key)


def _set(holder: Any, part: str, value: Any, key: str) -> None:
    if isinstance(holder, list):
        holder.append(value)
    elif part in holder:
        raise FieldError(key[:64], f"{key!r:.80} is given twice: give it once")
    else:
        holder[part] = value


def _inner(holder: Any, part: str, new: Any, inner: str, key: str) -> Any:
    """What `part` of `holder` holds, made where it is not there; of a list the last one, or a new one."""
    if isinstance(holder, list):
        last = holder[-1] if holder else None
        if not isinstance(last, type(new)) or (isinstance(last, dict) and inner in last):
            holder.append(new)
        return holder[-1]
    found = holder.setdefault(part, new)
    if not isinstance(found, type(new)):
        raise FieldError(key[:64], f"{key!r:.80} is given in two forms: give it in one")
    return found


def _typed(name: str, value: Any) -> Any:
    """A text of a form as the value that it says."""
    if isinstance(value, Upload) or name in _TEXTS:
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return value
