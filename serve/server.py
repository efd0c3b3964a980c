"""A server from its options to its end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import DiffoundryError, RequestError
from ..runtime.lora import Lora
from ..runtime.pipeline import load
from ..runtime.request import Request
from .admission import PATIENCE
from .app import DRAIN_SECONDS, build
from .guard import Key, check_origins, read_keys
from .memory import few_arenas
from .models import Model, Models
from .scheduler import Scheduler
from .service import Service
from .tickets import Ticket

_WARM_STEPS, _WARM_ROWS = 2, 16
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Options:
    """What `diffoundry serve` is asked for. bundles: by the names of their models; loras: by theirs.

    patience: see `Admission`. memory: bytes. keys: the file of them. origins: of pages that may ask from a browser.
    page: whether there is one at `/`. version: of diffoundry. Raises `RequestError` for origins that are none.
    """

    bundles: Mapping[str, Path]
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str | None = None
    precision: str | None = None
    threads: int | None = None
    rows: int = 8
    queue: int = 64
    patience: float = PATIENCE
    memory: int | None = None
    keys: Path | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    origins: Sequence[str] = ()
    warm: bool = False
    drain: float = DRAIN_SECONDS
    page: bool = True
    version: str = ""

    def __post_init__(self) -> None:
        check_origins(self.origins)


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end. say: shows a line.

    Raises `DiffoundryError` for what cannot be served, before the first request is taken.
    """
    try:
        from .http import Server
    except ImportError:
        raise missing() from None
    keys = [] if options.keys is None else read_keys(options.keys)
    few_arenas()
    listener = reserve(options.host, options.port)
    try:
        service = make(options, say)
        app = build(service, keys=keys, origins=options.origins, drain=options.drain, with_page=options.page)
        log_to_stderr()
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise RequestError(
                f"cannot listen on port {options.port} ({error.strerror}): give another --port"
            ) from None
        service.scheduler.start()
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        say(f"listening on http://{place}:{port}/v1 ({guarded(keys)})")
        if options.page:
            say(f"a page to draw in: http://{place}:{port}/")
        with contextlib.suppress(KeyboardInterrupt):  # which ends it as SIGTERM does
            Server(app, service.scheduler, options.drain, say).run(sockets=[listener])
    finally:
        listener.close()


def guarded(keys: Sequence[Key]) -> str:
    """How a server is guarded, in words."""
    if not keys:
        return "no keys: everybody that reaches it may draw"
    return f"{len(keys)} key{'s' if len(keys) > 1 else ''}"


def make(options: Options, say: Callable[[str], None]) -> Service:
    """The models, checked and where asked warm, and the scheduler, not started."""
    held = open_models(options, say)
    scheduler = Scheduler(held, most_rows=options.rows, queue=options.queue, patience=options.patience)
    for model in held if options.warm else ():
        counts = (1, min(options.rows, _WARM_ROWS)) if "txt2img" in model.pipeline.bundle.manifest.tasks else ()
        jobs = [model.pipeline.job(Request("", steps=_WARM_STEPS, count=count)) for count in counts]
        scheduler.warm(model, *(Ticket(model, job) for job in jobs))
        say(f"{model.name}: warm")
    return Service(held, scheduler, options.version)


def open_models(options: Options, say: Callable[[str], None]) -> Models:
    """The models, held against their hashes. No engine is loaded. Raises `DiffoundryError` for what is wrong."""
    models = []
    for name, path in options.bundles.items():
        pipeline = load(path, engine=options.engine, precision=options.precision, threads=options.threads)
        pipeline.bundle.check(known=True)
        model = Model(name, pipeline)
        info = pipeline.info()
        say(f"{name}: {path}, {info['engine']} in {info['precision']}, about {model.size / 2**20:.0f} MiB")
        models.append(model)
    for lora, file in options.loras.items():
        taken = _offer(models, lora, file)
        say(f"LoRA {lora}: {file}, for {', '.join(taken)}")
    return Models(models, options.memory)


def _offer(models: Sequence[Model], lora: str, file: str) -> list[str]:
    """Let requests name a LoRA of the models that take it. Returns their names. Raises where none does."""
    errors: list[DiffoundryError] = []
    takers = [model for model in models if model.pipeline.lora_denoiser]
    for model in takers or models:
        try:
            model.pipeline.job(Request("", steps=1, loras=(Lora(file),)))
            model.loras[lora] = file
        except DiffoundryError as error:
            errors.append(error)
    if len(errors) == len(takers or models):
        raise RequestError(f"--lora {lora}: {errors[0]}")
    return [model.name for model in models if lora in model.loras]


def named(bundles: Sequence[str]) -> dict[str, Path]:
    """Bundles, each [NAME=]PATH, by the names of their models. Raises `RequestError` for one name twice."""
    found: dict[str, Path] = {}
    for text in bundles:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            name, path = Path(text).resolve().name.removesuffix(".bundle"), text
        if not name or not path:
            raise RequestError(f"{text!r} is neither a bundle nor NAME=BUNDLE: give the folder of a bundle")
        if name in found:
            raise RequestError(f"two bundles are called {name}: give one another name, NAME=BUNDLE")
        found[name] = Path(path)
    return found


def missing() -> DiffoundryError:
    """The error where the extra is not installed."""
    return DiffoundryError("serving needs starlette, uvicorn and others: pip install 'diffoundry[serve]'")


def reserve(host: str, port: int) -> socket.socket:
    """A socket at this place, which does not listen yet. Raises `RequestError` where it cannot be had."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol said, asyncio sends small answers at once; else they wait 40 ms for an acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name != "nt":  # where it would take a port from another program
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(f"cannot listen on {host}, port {port} ({why}): give another --port or --host") from None


class _Lines(logging.Formatter):
    """Each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        if record.levelno == logging.INFO and text.startswith("{"):
            return text
        return json.dumps({"level": record.levelname.lower(), "message": text})


def log_to_stderr() -> None:
    """Let the server's lines, and what else is worth it, go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    levels = {"diffoundry.serve": logging.INFO, "uvicorn": logging.WARNING, "asyncio": logging.WARNING}
    for name, level in levels.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
    for name in ("python_multipart", "multipart"):  # which warn of every damaged form
        logging.getLogger(name).setLevel(logging.ERROR)
