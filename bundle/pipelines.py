"""What the pipeline classes of diffusers do with the configurations of a checkpoint, by family and task.

`StableDiffusionPipeline` and its kin correct configurations that early versions wrote, when they are made; the classes
of the other families do not. Which numbers of an autoencoder are read is a matter of the class too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_FROM_TEXT = {"steps_offset": 1, "clip_sample": False}
_SCHEDULER = {
    "stable-diffusion": {
        "txt2img": _FROM_TEXT,
        "img2img": _FROM_TEXT,
        "inpaint": {"steps_offset": 1, "skip_prk_steps": True},
    }
}
"""What the class of a family and task sets an option of the scheduler to, where the scheduler has that option."""
_WITH_DEVIATIONS = "stable-diffusion-xl"
"""The family whose classes read `latents_mean` and `latents_std`. No class reads `shift_factor`."""
INPAINT_BY_FACTOR = "inpaint_by_factor"
"""The option of a bundle whose pipelines decode with mean and deviation and encode what is inpainted without."""
_OLD = (0, 9)
_OLD_SIDE = 64
_RELEASE = re.compile(r"\d+(?:\.\d+)*")


def scheduler_mends(family: str, tasks: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, bool | int]]:
    """For each task the options that its pipeline class changes, of a scheduler with all the options in `config`."""
    found = {
        task: {
            name: value
            for name, value in _SCHEDULER.get(family, {}).get(task, {}).items()
            if name in config and config[name] != value
        }
        for task in tasks
    }
    return {task: changes for task, changes in found.items() if changes}


def default_side(family: str, side: int, version: object) -> int:
    """`sample_size` of a U-Net's configuration, in latents, as the pipeline classes take it.

    version: the `_diffusers_version` of the configuration. Those of Stable Diffusion take less than 64 for a mistake
    in what was written before 0.9.
    """
    release = _RELEASE.match(version) if isinstance(version, str) else None
    if family != "stable-diffusion" or release is None:
        return side
    old = tuple(int(number) for number in release[0].split(".")) < _OLD
    return max(side, _OLD_SIDE) if old else side


def latent_deviations(family: str, vae: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the latents, () and () where the classes read none."""
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if family != _WITH_DEVIATIONS or mean is None or std is None:
        return (), ()
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)
