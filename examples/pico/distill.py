"""Distil pico to four steps: `python -m diffoundry.examples.pico.distill`, which goes on where it was stopped.

Guided consistency distillation in latent space (Luo et al. 2023, "Latent Consistency Models", algorithm 1):

- the student is pico's U-Net plus an embedding of the guidance weight w, whose projection starts at zero;
- the teacher, pico's U-Net with classifier-free guidance w, goes one DDIM step of 20 timesteps down the ODE;
- the student's picture at the upper point is drawn to the target's at the lower one, where the target is an
  exponential moving average of the student (Song et al. 2023, "Consistency Models", algorithm 2);
- the loss is the pseudo-Huber norm of Song & Dhariwal 2024, "Improved techniques for training consistency models",
  over σ/α: without that the noisy points, whose errors are large, drown the clean ones on which all others build;
- c_skip and c_out are those of diffusers' `LCMScheduler`, which samples from the result.

Text encoder, tokenizer and autoencoder stay pico's. On one CPU core the whole takes about twenty minutes.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .score import GUIDANCE
from .scorer import score
from .train import BETAS, _Training, encode_world
from .world import Scene, random_caption, split_scenes

PICO = Path(__file__).parent
GUIDANCE_RANGE = (2.0, 9.0)
"""Lowest and highest guidance_scale that the student learns; it embeds w = guidance_scale - 1 as diffusers does."""

_EMBEDDING = 64
_POINTS = 50
_SKIP = BETAS["num_train_timesteps"] // _POINTS
_HUBER = 0.00054 * (4 * 8 * 8) ** 0.5  # of the latents of a picture, as Song & Dhariwal choose it
_TARGET_DECAY = 0.98


def make_scheduler() -> LCMScheduler:
    """The sampler of the student: betas and parameterisation of pico, 50 timesteps to choose from."""
    others = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return LCMScheduler(**BETAS, **others, original_inference_steps=_POINTS)


def make_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher's U-Net with an embedding of w that does not count yet: with any w it predicts what it predicted."""
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": _EMBEDDING})
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    return student


class Solver:
    """What turns a noise prediction at a timestep into a picture or into the point below, over a batch of timesteps."""

    def __init__(self, scheduler: LCMScheduler) -> None:
        self._scheduler = scheduler

    def _alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self._scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`clean` (n, c, h, w) at the noise level of `timesteps` (n)."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha * clean + sigma * noise

    def ratio(self, timesteps: torch.Tensor) -> torch.Tensor:
        """σ/α of `timesteps` (n), as (n, 1, 1, 1): how much an error of the noise predicted weighs in the picture."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return sigma / alpha

    def consistency(self, noise: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """f(z, t) = c_skip z + c_out x_0 (Song et al. 2023, equation 5), where x_0 follows from the noise predicted."""
        alpha, sigma = self._alpha_sigma(timesteps)
        c_skip, c_out = self._scheduler.get_scalings_for_boundary_condition_discrete(timesteps.view(-1, 1, 1, 1))
        return c_skip * sample + c_out * (sample - sigma * noise) / alpha

    def ddim(
        self, noise: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor, below: torch.Tensor
    ) -> torch.Tensor:
        """`sample` moved from `timesteps` to the timesteps `below` (Song et al. 2021, equation 12 with eta 0)."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return self.noised((sample - sigma * noise) / alpha, noise, below)


def make_pipeline(pico: Path, unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """pico in fp32, with `unet` and the student's scheduler if given."""
    own = {} if unet is None else {"unet": unet, "scheduler": make_scheduler()}
    pipeline = StableDiffusionPipeline.from_pretrained(pico, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, scenes: list[Scene], steps: int, guidance: float) -> list[np.ndarray]:
    """Pictures of the scenes' captions; number i has the seed i."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
    images = pipeline(
        [str(scene) for scene in scenes],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    ).images
    return [np.asarray((image * 255).round(), np.uint8) for image in images]


def distil(
    work: Path, pico: Path, steps: int, batch: int = 48, pictures: int = 61440, rate: float = 5e-4
) -> UNet2DConditionModel:
    """Returns the averaged student. Prints the score at 4 steps of some held-out captions now and then."""
    teacher_pipeline = make_pipeline(pico)
    teacher, text_encoder = teacher_pipeline.unet.eval(), teacher_pipeline.text_encoder.eval()
    student = make_student(teacher)
    target = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(_TARGET_DECAY))
    pipeline = make_pipeline(pico, target.module)
    solver = Solver(pipeline.scheduler)
    latents, rows_scenes = encode_world(teacher_pipeline.vae, work, pictures)
    train, held_out = split_scenes()

    def embed(captions: list[str]) -> torch.Tensor:
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_encoder(tokens)[0]

    with torch.no_grad():
        nothing = embed([""]).expand(batch, -1, -1)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((6, step))
        rows = rng.integers(0, len(latents), batch)
        generator = torch.Generator().manual_seed(step)
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn(clean.shape, generator=generator)
        upper = torch.randint(1, _POINTS + 1, (batch,), generator=generator) * _SKIP - 1
        lower = (upper - _SKIP).clamp(min=0)
        low, high = GUIDANCE_RANGE
        w = low - 1 + (high - low) * torch.rand(batch, generator=generator)
        guidance = pipeline.get_guidance_scale_embedding(w, _EMBEDDING)
        noisy = solver.noised(clean, noise, upper)
        with torch.no_grad():
            prompts = embed([random_caption(train[int(rows_scenes[row])], rng) for row in rows])
            both = teacher(torch.cat([noisy, noisy]), torch.cat([upper, upper]), torch.cat([prompts, nothing])).sample
            conditional, unconditional = both.chunk(2)
            guided = conditional + w.view(-1, 1, 1, 1) * (conditional - unconditional)
            less_noisy = solver.ddim(guided, upper, noisy, lower)
            wanted = solver.consistency(
                target(less_noisy, lower, prompts, timestep_cond=guidance).sample, lower, less_noisy
            )
        predicted = student(noisy, upper, prompts, timestep_cond=guidance).sample
        difference = (solver.consistency(predicted, upper, noisy) - wanted) / solver.ratio(upper)
        return (difference.pow(2).sum(dim=(1, 2, 3)) + _HUBER**2).sqrt().mean() - _HUBER

    training = _Training(
        work / "lcm.pt", {"student": student, "target": target}, list(student.parameters()), rate, steps
    )

    def after() -> None:
        target.update_parameters(student)
        done = int(target.n_averaged)
        if done % 500 == 0:
            share = score(draw(pipeline, held_out[:60], 4, GUIDANCE), held_out[:60])["all"]
            print(f"lcm step {done}: {100 * share:.1f} % of attributes right at 4 steps", flush=True)

    training.run(loss_of, after)
    return target.module.eval()


def write_student(out: Path, unet: UNet2DConditionModel) -> None:
    """Write `out`/unet, stored in fp16, and `out`/scheduler."""
    unet.half().save_pretrained(out / "unet", safe_serialization=True)
    make_scheduler().save_pretrained(out / "scheduler")


@click.command()
@click.option(
    "--pico", type=click.Path(exists=True, path_type=Path), default=PICO, help="The teacher.  [default: this folder]"
)
@click.option("--out", type=click.Path(path_type=Path), default=PICO / "lcm", help="[default: lcm in this folder]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/pico-train"),
    show_default=True,
    help="Training state, to resume from, and latents, which `train` leaves there too.",
)
@click.option("--steps", default=2400, type=click.IntRange(1), show_default=True)
@click.option("--batch", default=48, type=click.IntRange(1), show_default=True)
@click.option("--pictures", default=61440, type=click.IntRange(1), show_default=True, help="Pictures to encode.")
def main(pico: Path, out: Path, work: Path, steps: int, batch: int, pictures: int) -> None:
    """Distil pico, or go on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    write_student(out, distil(work, pico, steps, batch, pictures))
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
