"""The command line: one file a verb."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import click

from .. import __version__
from ..common.errors import DiffoundryError
from ..common.files import disk_error
from ..common.interrupts import noting_interrupts
from .bench import bench_command
from .build import build_command
from .compile import compile_command
from .inspect import inspect_command
from .run import run_command
from .schedulers import schedulers_command
from .serve import serve_command
from .streams import open_streams, shown
from .verify import verify_command

_INTERRUPTED = "interrupted; what was finished is kept, run the same command again to go on"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Compile diffusers checkpoints into engines and run them without PyTorch."""


for command in (
    compile_command,
    build_command,
    run_command,
    inspect_command,
    verify_command,
    schedulers_command,
    bench_command,
    serve_command,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    open_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture is read, or the error says why not
    with noting_interrupts() as interrupts:
        try:
            code = cli.main(prog_name="diffoundry", standalone_mode=False)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except DiffoundryError as error:
            _fail(_INTERRUPTED if interrupts else str(error))
        except (click.Abort, KeyboardInterrupt):
            _fail(_INTERRUPTED)
        except MemoryError:
            _fail("out of memory: end other programs that hold memory, or ask for a smaller size or batch")
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            _fail(str(disk_error(error)))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print("Error: " + shown(" ".join(message.split())), file=sys.stderr)
    sys.exit(1)
