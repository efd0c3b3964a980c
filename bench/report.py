"""The report of a run of `diffoundry bench`: what was measured, of what, on which machine; see `docs/bench.md`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..bundle.reader import FieldError, Rule, read
from ..common.checks import is_whole
from ..common.errors import BenchError
from ..common.files import read_json, write_json

SCHEMA_VERSION = 1
"""Raised when a reader of the old version would misread the new report."""
OURS = "diffoundry"
"""The name of our system; the others have the names of `--vs`."""
REMEDY = "measure again with `diffoundry bench BUNDLE --json FILE`"

Seconds = Annotated[float, Rule(lambda value: value >= 0, "be 0 or more")]
Count = Annotated[int, Rule(lambda value: value >= 0, "be 0 or more")]
AtLeast1 = Annotated[int, Rule(lambda value: value >= 1, "be at least 1")]
ScenarioName = Literal["single", "offline", "server"]


@dataclass(frozen=True, slots=True)
class BundleSummary:
    """The bundle that was measured. source: what it was compiled from. sha256: of its manifest."""

    name: str
    family: str
    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for. count: pictures of a turn. precision: of our system. threads: of each system.

    engine: of our system. turns, cold: how many of each were asked for. batch: the most pictures in one call.
    p99_s: of the scenario `server`. rows: of the denoiser in a step, two a picture with guidance.
    """

    prompt: str
    negative_prompt: str | None
    width: AtLeast1
    height: AtLeast1
    steps: AtLeast1
    guidance: float
    scheduler: str | None
    seed: int
    count: AtLeast1
    engine: str
    precision: str
    threads: AtLeast1
    scenario: ScenarioName
    turns: Count
    cold: Count
    batch: AtLeast1 = 1
    p99_s: float | None = None
    rows: AtLeast1 = 1


@dataclass(frozen=True, slots=True)
class Clock:
    """Of the processor, in MHz: the mean over its cores when the run began, and the highest that it is made for."""

    now: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that the run used."""

    name: str
    memory_bytes: Count


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the machine reached in the same run: a product of matrices, by precision, and a copy (bytes read, written).

    {} and None where it was not measured.
    """

    matmul_flops_per_s: dict[str, float] = field(default_factory=dict)
    copy_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """cores: that the run may use. load: processes that wanted a core in the minute before, None where not told."""

    processor: str
    cores: AtLeast1
    instruction_sets: tuple[str, ...]
    clock_mhz: Clock | None
    memory_bytes: Count | None
    gpu: Gpu | None
    system: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    load: float | None = None
    peaks: Peaks = field(default_factory=Peaks)


@dataclass(frozen=True, slots=True)
class Cold:
    """A start in a process of its own, in seconds since the process was started; each includes those before it.

    import_s: its imports are done. load_s: it has loaded, or as much as it loads ahead. first_step_s: the first step is
    done, None where it does not tell. first_image_s: the first picture is there.
    """

    import_s: Seconds
    load_s: Seconds
    first_step_s: Seconds | None
    first_image_s: Seconds


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts of a turn, in seconds. None, or nothing, where a system does not tell.

    before: from the call to the first step. first_step, steps: the first and the further steps. after: from the last
    step to the pictures. tokenize, text, image_encode: parts of `before`. decode: of `after`. denoiser, loop: of each
    step (the first too): the calls of the denoiser, and what is left of the step.
    """

    before: Seconds | None = None
    first_step: Seconds | None = None
    steps: tuple[Seconds, ...] = ()
    after: Seconds | None = None
    tokenize: Seconds | None = None
    text: Seconds | None = None
    image_encode: Seconds | None = None
    denoiser: tuple[Seconds, ...] = ()
    loop: tuple[Seconds, ...] = ()
    decode: Seconds | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A warm call from prompt to pictures."""

    seconds: Seconds
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Their seconds over ours, pair by pair: above 1 we are faster. low, high: quartiles."""

    median: float
    low: float
    high: float
    pairs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class System:
    """One that draws the pictures. name: `diffoundry`, or that of a peer. error: why there is nothing, or not all.

    psnr_db: of its picture against the reference, None where they are identical, or where there is none.
    max_levels: the largest difference of a byte to it, None where there is no picture to compare, and for the reference
    itself. changes_picture: whether that is more than one level. ratio, ratio_step: of whole turns, and of the median
    further step; None for our own.
    """

    name: str
    title: str
    precision: str
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    cold: tuple[Cold, ...] = ()
    turns: tuple[Turn, ...] = ()
    peak_rss_bytes: Count | None = None
    peak_gpu_bytes: Count | None = None
    psnr_db: float | None = None
    max_levels: Count | None = None
    changes_picture: bool = False
    ratio: Ratio | None = None
    ratio_step: Ratio | None = None


@dataclass(frozen=True, slots=True)
class ComponentCost:
    """One of our components. seconds_per_call: the median. flops, bytes: of a call; None where they are not counted.

    bytes are those of weights, inputs and outputs of all operators, as if nothing stayed in a cache.
    weights_bytes: in the precision that it is computed in; None where its files are not there.
    share_of_matmul_peak, share_of_copy_peak: of the machine's peaks that were measured in the same run; the second is
    above 1 where caches serve.
    """

    name: str
    calls_per_picture: float
    seconds_per_call: Seconds
    flops: float | None = None
    bytes: float | None = None
    share_of_matmul_peak: float | None = None
    share_of_copy_peak: float | None = None
    weights_bytes: Count | None = None


@dataclass(frozen=True, slots=True)
class BatchTried:
    """A batch of the scenario `offline`. seconds: the median of a call."""

    batch: AtLeast1
    seconds: Seconds
    images_per_s: float


@dataclass(frozen=True, slots=True)
class Offline:
    """The largest throughput of a system, over batches. rows_per_s: rows of calls of the denoiser."""

    system: str
    images_per_s: float
    rows_per_s: float
    batch: AtLeast1
    tried: tuple[BatchTried, ...] = ()


@dataclass(frozen=True, slots=True)
class RateTried:
    """A rate of arrivals of the scenario `server`, in pictures a second, and the latency in seconds that it gave."""

    rate: float
    p99: Seconds


@dataclass(frozen=True, slots=True)
class Server:
    """The highest rate of arrivals at which a system's p99 of latency stays under the limit.

    rate_per_s: 0 where no rate did. latencies_s: of the requests at that rate, from arrival to picture.
    """

    system: str
    p99_limit_s: float
    rate_per_s: float
    latencies_s: tuple[Seconds, ...] = ()
    tried: tuple[RateTried, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """What was measured beside single pictures; a row for each system that could."""

    name: ScenarioName = "single"
    offline: tuple[Offline, ...] = ()
    server: tuple[Server, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A run of `diffoundry bench`. date: ISO 8601. complete: False when it was interrupted: it has what was measured.

    command: the line that makes it again. reference: the picture that the others are held against, as
    `diffusers, fp32`; "" where there is none. notes: what a reader should know of these figures.
    """

    date: str
    complete: bool
    command: str
    bundle: BundleSummary
    request: Settings
    machine: Machine
    systems: tuple[System, ...]
    components: tuple[ComponentCost, ...] = ()
    scenario: Scenario = field(default_factory=Scenario)
    reference: str = ""
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def system(self, name: str) -> System | None:
        """The system called `name`, None where it was not measured."""
        return next((each for each in self.systems if each.name == name), None)


def to_json(report: Report) -> dict[str, Any]:
    """The report as a JSON object, schema version first."""
    value = asdict(report)
    return {"schema_version": value.pop("schema_version"), **value}


def from_json(value: dict[str, Any], where: str) -> Report:
    """Check `value` and return the report. where: its file. Raises `BenchError` naming the field that is wrong."""
    version = value.get("schema_version")
    if "serve_schema_version" in value:
        raise BenchError(f"{where} is a report of `diffoundry bench --serve`, which this does not read; {REMEDY}")
    if not is_whole(version) or version < 1:
        raise BenchError(f"{where} has no schema_version: it is no report of `diffoundry bench`; {REMEDY}")
    if version > SCHEMA_VERSION:
        raise BenchError(
            f"{where} has schema version {version}; this diffoundry reads up to {SCHEMA_VERSION}: upgrade diffoundry"
        )
    try:
        return read(Report, value)
    except FieldError as error:
        problem = " ".join(str(error).split())  # a key may hold anything
        raise BenchError(f"{where}: {problem}; {REMEDY}") from None


def save(report: Report, path: Path) -> None:
    """Write the report beside `path` and rename it into place. Raises `OSError`."""
    write_json(path, to_json(report))


def load(path: Path) -> Report:
    """Read the report in `path`.

    Raises `DiffoundryError` when it is missing, no report, cut off, or of a newer version.
    """
    return from_json(read_json(path, "the report"), str(path))
