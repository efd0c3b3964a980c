"""Whether this version can run a bundle, held against its manifest before anything is loaded."""

from __future__ import annotations

from ..bundle import AS_EXPORTED, PRECISIONS, Bundle
from ..bundle.wiring import SOURCES, TASKS
from ..common.errors import BundleError


def check_runnable(bundle: Bundle) -> None:
    """Raise `BundleError` for what this version cannot run, or would run without a hash to hold it against."""
    manifest, root = bundle.manifest, bundle.root
    unknown = sorted(set(manifest.wiring.inputs.values()) - set(SOURCES))
    if unknown:
        raise BundleError(
            f"{root}: the {manifest.family} denoiser reads {', '.join(unknown)}; this version knows "
            f"{', '.join(SOURCES)}: upgrade diffoundry"
        )
    if not manifest.wiring.text:
        raise BundleError(f"{root}: field 'wiring.text' is empty; compile the bundle again")
    if not {"latents", "timestep"} <= {source.partition(".masked")[0] for source in manifest.wiring.inputs.values()}:
        raise BundleError(f"{root}: no input of the denoiser takes the latents or the timestep; compile it again")
    if manifest.precision not in (*PRECISIONS, AS_EXPORTED):
        raise BundleError(f"{root} has precision {manifest.precision!r}; this version runs {', '.join(PRECISIONS)}")
    known = [task for task in manifest.tasks if task in TASKS]
    if not known:
        raise BundleError(
            f"{root} holds the tasks {', '.join(manifest.tasks) or '(none)'}; this version runs {', '.join(TASKS)}"
        )
    for role in ("denoiser", *dict.fromkeys(role for task in known for role in TASKS[task])):
        if not manifest.with_role(role):
            raise BundleError(f"{root} has no {role} among its components: compile it again")
    inputs = {tensor.name for tensor in bundle.component(manifest.named("denoiser")).inputs}
    if inputs != set(manifest.wiring.inputs):
        wrong = ", ".join(sorted(inputs ^ set(manifest.wiring.inputs)))
        raise BundleError(
            f"{root}: wiring and inputs of the denoiser do not agree on {wrong}; compile the bundle again"
        )
    if not bundle.foreign:
        folders = tuple(f"{folder}/" for folder in manifest.tokenizers)
        small = ["scheduler/scheduler_config.json", *(f for f in manifest.files if f.startswith(folders))]
        needed = [small[0], *(f"{folder}tokenizer.json" for folder in folders)]
        unlisted = [name for name in needed if name not in manifest.files]
        if unlisted:
            raise BundleError(f"{root}: the manifest has no hash for {', '.join(unlisted)}; compile the bundle again")
        bundle.check(small)
