"""Whether this version can run a bundle, held against its manifest before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..bundle import AS_EXPORTED, PRECISIONS, Bundle, Component
from ..bundle.wiring import MODE, NAME, PICTURE, PICTURE_SIDES, SCALE, SOURCES, STRENGTH, TASKS, plain
from ..common.errors import BundleError
from ..families.control import halved


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
    if not {"latents", "timestep"} <= {plain(source) for source in manifest.wiring.inputs.values()}:
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
    unit, sides = manifest.latents.unit, (manifest.default_width, manifest.default_height)
    if any(side % unit for side in sides) or unit > manifest.largest_side:
        raise BundleError(
            f"{root}: it draws {sides[0]}x{sides[1]} pixels by default, where sides are multiples of {unit} up to "
            f"{manifest.largest_side}; compile the bundle again"
        )
    _check_shapes(bundle)
    _check_texts(bundle)
    _check_told(bundle)
    _check_adapted(bundle)
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


_AXES = {
    "latents": 4,
    "picture": 4,
    "text.hidden": 3,
    "text.pooled": 2,
    "text.mask": 2,
    "sizes": 2,
    "sizes.scored": 2,
    "guidance": 1,
    "guidance.sinusoid": 2,
    "layers": 2,
}
"""How many axes an input has that is fed with each."""


def _check_shapes(bundle: Bundle) -> None:
    """Raise `BundleError` for an input of the denoiser that is not of the shape of what feeds it."""
    wiring, widths = bundle.manifest.wiring, _widths(bundle)
    for tensor in bundle.component(bundle.manifest.named("denoiser")).inputs:
        source = wiring.inputs.get(tensor.name, "")
        due = _AXES.get(plain(source), len(tensor.shape))
        if len(tensor.shape) != due:
            raise BundleError(
                f"{bundle.root}: the input {tensor.name} of the denoiser has {len(tensor.shape)} axes, what feeds it "
                f"has {due}; compile the bundle again"
            )
        axis = 1 if due == _AXES["latents"] else -1
        width, found = widths.get(source), tensor.shape[axis] if tensor.shape else None
        if width is not None and isinstance(found, int) and found != width:
            raise BundleError(
                f"{bundle.root}: the input {tensor.name} of the denoiser takes {found} numbers, {source} feeds it "
                f"{width}; compile the bundle again"
            )
        shown = tensor.shape[2:] == PICTURE_SIDES
        if shown != (source == "picture") and due == _AXES["picture"] and not bundle.foreign:
            raise BundleError(
                f"{bundle.root}: the input {tensor.name} of the denoiser has the axes "
                f"{', '.join(map(str, tensor.shape[2:]))!r:.80}, which are not those of {source}; compile the bundle "
                "again"
            )
    if wiring.inputs_from("picture") and not wiring.picture_sizes:
        raise BundleError(f"{bundle.root}: field 'wiring.picture_sizes' is empty; compile the bundle again")


def _widths(bundle: Bundle) -> dict[str, int]:
    """How many numbers some sources feed, or channels; those that are not known are left out."""
    manifest = bundle.manifest
    channels, pixels = manifest.latents.channels, manifest.latents.downscale**2
    widths = {
        "latents": channels,
        "latents.masked": 2 * channels + 1,
        "latents.beside": 2 * channels,
        "latents.filled": 2 * channels + pixels,
        "picture": channels,
        "sizes": 6,
        "sizes.scored": 5,
    }
    hidden, pooled = 0, 0
    for encoder in manifest.wiring.text:
        made = {tensor.name: tensor.shape[-1] for tensor in bundle.component(encoder.component).outputs if tensor.shape}
        own, summary = made.get(encoder.hidden), made.get(encoder.pooled)
        if (encoder.hidden and not isinstance(own, int)) or (encoder.pooled and not isinstance(summary, int)):
            return widths
        if isinstance(own, int):
            hidden = max(hidden, own) if encoder.join == "sequence" else hidden + own
        pooled += summary if isinstance(summary, int) else 0
    if hidden and not manifest.wiring.zeros:  # with zeros they are filled up to what the denoiser reads
        widths["text.hidden"] = hidden
    return {**widths, "text.pooled": pooled} if pooled else widths


def _part(bundle: Bundle, name: str, role: str) -> Component:
    """The component of this name. Raises `BundleError` where there is none, or one of another role."""
    components = bundle.manifest.components
    if name not in components or components[name].role != role:
        raise BundleError(f"{bundle.root}: it has no component {name!r:.60} of the role {role}; compile it again")
    return components[name]


def _check_texts(bundle: Bundle) -> None:
    """Raise `BundleError` unless text encoders give what the wiring reads of them."""
    for encoder in bundle.manifest.wiring.text:
        made = {tensor.name for tensor in _part(bundle, encoder.component, "text").outputs}
        missing = {*filter(None, (encoder.hidden, *encoder.skips, encoder.pooled))} - made
        if made and missing:
            raise _disagree(bundle, min(missing))


def _check_told(bundle: Bundle) -> None:
    """Raise `BundleError` unless controls and image prompts are what the wiring says of them."""
    wiring, part = bundle.manifest.wiring, partial(_part, bundle)
    if not wiring.controls and not wiring.image_prompts:
        return
    latents = bundle.manifest.latents.channels
    controlled = part(bundle.manifest.named("controlled"), "controlled")
    takes = {tensor.name: tensor.shape for tensor in controlled.inputs}
    told = [name for each in wiring.image_prompts.values() for name in each.inputs]
    residuals = set(takes) - set(wiring.inputs) - set(told)
    made_of = {t.name for each in wiring.controls.values() for t in part(each.component, "control").outputs}
    unknown = [name for name in residuals if name.partition(".")[0] not in made_of]
    if unknown:
        raise _disagree(bundle, unknown[0])
    wrong = [name for name in (*wiring.controls, *wiring.image_prompts) if not NAME.fullmatch(name)]
    wrong += [name for name in told if name not in takes or told.count(name) > 1 or name in wiring.inputs]
    for name, control in wiring.controls.items():
        made = part(control.component, "control")
        own = {tensor.name: tensor.shape for tensor in made.inputs}
        many = (MODE, STRENGTH) if control.kind == "union" else ()
        picture = own.get(PICTURE, ())
        sound = (
            own.keys()
            <= {*(() if control.kind == "adapter" else wiring.inputs), PICTURE, SCALE, *many, *control.of_prompt}
            and control.of_prompt.keys() <= own.keys()
            and not control.of_prompt.keys() & wiring.inputs.keys()
            and set(control.of_prompt.values()) <= set(wiring.inputs.values())
            and len(picture) == (5 if many else 4)
            and (not many or isinstance(picture[1], str))
            and picture[-3:-2] == (control.channels,)
            and (not many or own.get(MODE, ())[2:] == (control.modes,))
            and len(own.get(STRENGTH, ())) == len(many)
            and own.get(SCALE, ())[1:] == (control.residuals,)
            and len(made.outputs) == control.residuals
            and {tensor.name for tensor in made.outputs} <= residuals
        )
        due = (latents + control.masked,) if control.encoded else (1, 3)
        wrong += [] if sound and control.channels in due else [name]
        if control.encoded and not bundle.manifest.with_role("encoder"):
            raise BundleError(
                f"{bundle.root} has no encoder among its components, which encodes the pictures of the control {name}: "
                "compile it again"
            )
    for name, prompt in wiring.image_prompts.items():
        tokens = part(prompt.component, "image_prompt")
        reads = [tensor.shape[1:] for tensor in tokens.inputs]
        encoded = len(reads) == 1 and len(reads[0]) == 1
        if prompt.encoder:
            encoder = part(prompt.encoder, "image")
            given = {tensor.name: tensor.shape for tensor in encoder.outputs}
            encoded = reads == [given.get(prompt.output, ())[1:]]
            encoded &= [tensor.shape[1:] for tensor in encoder.inputs] == [(3, prompt.side, prompt.side)]
        sound = (
            encoded
            and [len(tensor.shape) for tensor in tokens.outputs] == [3]
            and all(isinstance(size, int) for tensor in tokens.outputs for size in tensor.shape[1:])
            and takes.get(prompt.scale, ())[1:] == (prompt.layers,)
            and len(takes.get(prompt.tokens, ())) == 4
            and (
                _are_masks([takes.get(name, ()) for name in prompt.masks], takes[prompt.tokens][1])
                if prompt.masks
                else takes[prompt.tokens][1] == 1
            )
        )
        wrong += [] if sound else [name]
    axes = 4 if wiring.flow is None else 3
    wrong += [] if all(len(shape) == axes for name, shape in takes.items() if name in residuals) else ["the denoiser"]
    if wrong:
        raise _disagree(bundle, wrong[0])


def _check_adapted(bundle: Bundle) -> None:
    """Raise `BundleError` unless the denoiser that takes LoRAs is what the wiring says of it."""
    manifest = bundle.manifest
    named = list(manifest.wiring.lora_inputs)
    if named != manifest.with_role("lora") or len(named) > 1:
        raise _disagree(bundle, next(iter(named), "lora"))
    for name, inputs in manifest.wiring.lora_inputs.items():
        takes = {tensor.name: tensor.shape for tensor in manifest.components[name].inputs}
        factors = [takes.pop(each, ()) for each in (inputs.down, inputs.up)]
        sound = all(len(shape) == 3 and isinstance(shape[1], int) for shape in factors)
        listed = bool(inputs.weights) and len(set(inputs.weights)) == len(inputs.weights)
        if not sound or not listed or set(takes) != set(manifest.wiring.inputs):
            raise _disagree(bundle, name)


def _are_masks(shapes: Sequence[tuple[int | str, ...]], groups: int | str) -> bool:
    """Whether inputs of these shapes take masks of so many groups, each at a size of its own."""
    sizes = [shape[2:] for shape in shapes]
    heights = [name for name in halved({"height": 1, "width": 1}) if name.startswith("height")]
    names = [(name, name.replace("height", "width")) for name in heights]
    return (
        bool(sizes)
        and all(shape[1:2] == (groups,) for shape in shapes)
        and len(set(sizes)) == len(sizes)
        and all(size in names for size in sizes)
    )


def _disagree(bundle: Bundle, name: str) -> BundleError:
    return BundleError(
        f"{bundle.root}: its wiring and its components do not agree on {name!r:.60}; compile the bundle again"
    )
