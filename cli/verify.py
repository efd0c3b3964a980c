"""`diffoundry verify`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .options import ENGINES, engine_option, json_option, precision_option, threads_option
from .streams import shown


@click.command("verify")
@click.argument("bundle", type=click.Path())
@engine_option(f"{ENGINES}.", default="onnxruntime")
@precision_option("Of the models. [default: all that the bundle has and the engine runs]")
@threads_option
@json_option
def verify_command(bundle: str, engine: str, precision: str | None, threads: int | None, as_json: bool) -> None:
    """Check BUNDLE: every hash, then every output.

    Each component runs on recorded inputs and is held against what torch gave when it was compiled. TensorRT plans run
    at their own shapes and are held against ONNX Runtime; with another engine, their hashes alone are checked.
    """
    from ..common.errors import BundleError
    from ..engines.verify import twins, verify
    from ..families import open_bundle

    opened = open_bundle(bundle)
    checks = []
    for check in verify(opened, engine=engine, precision=precision, threads=threads):
        checks.append(check)
        if not as_json:
            verdict = "ok" if check.passed else "FAILED"
            name = check.component if check.precision == "fp32" else f"{check.component} {check.precision}"
            click.echo(f"{shown(name)}: {verdict}, error {check.max_abs_error:.1e} of {check.allowed:.1e} allowed")
    failed = list(dict.fromkeys(check.component for check in checks if not check.passed))
    if as_json:
        rows = [asdict(check) for check in checks]
        print(json.dumps({"bundle": str(opened.root), "files": len(opened.manifest.all_files()), "components": rows}))
    else:
        for name, what in twins(opened).items():
            click.echo(shown(f"{name}: not run, of it a twin was held against torch ({what})"))
        click.echo(f"{len(opened.manifest.all_files())} files unchanged")
    if failed:
        raise BundleError(
            f"{', '.join(failed)} no longer gives what torch gave: compile the bundle again on this machine"
        )
