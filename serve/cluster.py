"""What is asked for of a server on several machines: its options, as `serve run` gives them, and its replicas."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.checks import MOST_THREADS, is_number, whole_number
from ..common.errors import RequestError
from ..engines.names import OPENVINO, EngineName
from ..families import open_bundle
from .server import Options, named

_MOST_REPLICAS = 1024
_REPLICAS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_SHARE = 0.99
"""Of a GPU, for a replica. The rest is for the ingress, which reads bundles with the same engine but loads nothing."""
_MOST_GIB, _LONGEST_S = 100_000, 86_400.0


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas there are: from `least` to `most`, by the images that wait."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: object) -> Replicas:
        """Read `N` or `MIN-MAX`. Raises `RequestError`."""
        found = _REPLICAS.fullmatch(str(text))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most <= _MOST_REPLICAS:
            raise RequestError(
                f"replicas must be a number or MIN-MAX, such as 1-4, from 1 to {_MOST_REPLICAS}, found {text!r:.60}"
            )
        return cls(least, most)


@dataclass(frozen=True, slots=True)
class Device:
    """What Ray is asked for a replica, and for the ingress: processors and GPUs."""

    replica: Mapping[str, float]
    ingress: Mapping[str, float]

    def fit(self, resources: Mapping[str, float]) -> int:
        """How many replicas so many processors and GPUs (`CPU`, `GPU`) have room for."""
        own = {name.removeprefix("num_").upper()[:3]: amount for name, amount in self.replica.items()}
        if "GPU" in own:
            own = {"GPU": 1.0}
        return min(int(resources.get(name, 0) // amount) for name, amount in own.items())


def device_of(options: Options) -> Device:
    """A GPU for a replica, or `threads` processors. Raises `RequestError` and what `open_bundle` raises."""
    names = {EngineName.parse(options.engine or open_bundle(path).manifest.engine) for path in options.bundles.values()}
    others = [name for name in names if name.backend == OPENVINO and not name.on_cpu]
    if others:
        raise RequestError(
            f"replicas are for processors and CUDA GPUs, and {others[0]} is for neither: leave out --ray"
        )
    if all(name.on_cpu for name in names):
        if options.threads is None:
            raise RequestError("a replica on the processor needs to know how many cores it may take: give --threads")
        return Device({"num_cpus": float(options.threads)}, {"num_cpus": 0.0})
    return Device({"num_gpus": _SHARE, "num_cpus": 1.0}, {"num_gpus": 1 - _SHARE, "num_cpus": 0.0})


def absolute(options: Options) -> Options:
    """Options whose paths mean the same in every process."""
    return replace(
        options,
        bundles={name: path.resolve() for name, path in options.bundles.items()},
        keys=None if options.keys is None else options.keys.resolve(),
        loras={name: str(Path(file).resolve()) for name, file in options.loras.items()},
    )


def read_arguments(given: Mapping[str, Any]) -> tuple[Options, Replicas | None]:
    """The arguments of an application: options of `diffoundry serve` by their names, with _ for -.

    Values are texts, as `serve run` gives them, or those of YAML. bundles, lora and cors are lists, or texts with
    commas. The replicas are None where nothing says how many. Raises `RequestError` for what is unknown or wrong.
    """
    values = dict(given)
    if not values.get("bundles"):
        raise RequestError("an application needs bundles: give bundles=[NAME=]BUNDLE,…")
    replicas = Replicas.parse(values.pop("replicas")) if "replicas" in values else None
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _ARGUMENTS:
            raise RequestError(f"there is no argument {name!r:.60}, only {', '.join([*_ARGUMENTS, 'replicas'])}")
        field, read = _ARGUMENTS[name]
        options[field] = read(name, value)
    return Options(**options), replicas


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = [f"{key}={each}" for key, each in value.items()]
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(each, str) and each.strip() for each in given):
        raise RequestError(f"{name} must be a list of texts, found {value!r:.60}")
    return [each.strip() for each in given]


def _loras(name: str, value: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in _texts(name, value):
        key, sign, file = text.partition("=")
        if not key or not file or key in found:
            raise RequestError(f"{name} takes NAME=FILE, each name once, found {text!r:.60}")
        found[key] = file
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be a text, found {value!r:.60}")
    return value


def _number(name: str, value: Any, most: float, least: float = 0.0) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_number(number) or not least <= number <= most:
        raise RequestError(f"{name} must be a number from {least:g} to {most:g}, found {value!r:.60}")
    return float(number)


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        return whole_number(name, int(value) if isinstance(value, str) and value.isdecimal() else value, low, high)

    return read


def _switch(name: str, value: Any) -> bool:
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise RequestError(f"{name} must be true or false, found {value!r:.60}")
    return known[str(value).lower()]


_MOST_PATIENCE = 1e6
_ARGUMENTS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "bundles": ("bundles", lambda name, value: named(_texts(name, value))),
    "engine": ("engine", _text),
    "precision": ("precision", _text),
    "threads": ("threads", _whole(1, MOST_THREADS)),
    "max_rows": ("rows", _whole(1, 4096)),
    "queue": ("queue", _whole(0, 100_000)),
    "patience": ("patience", lambda name, value: _number(name, value, _MOST_PATIENCE, least=1.0)),
    "memory": ("memory", lambda name, value: int(_number(name, value, _MOST_GIB) * 2**30)),
    "api_key_file": ("keys", lambda name, value: Path(_text(name, value))),
    "lora": ("loras", _loras),
    "cors": ("origins", _texts),
    "warm": ("warm", _switch),
    "page": ("page", _switch),
    "drain": ("drain", lambda name, value: _number(name, value, _LONGEST_S)),
}
"""By the name of an argument the field of `Options`, and how its value is read."""
