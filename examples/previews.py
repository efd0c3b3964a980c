"""Step by step, with a picture of every fifth step; leave the loop whenever you have seen enough.

python examples/previews.py [BUNDLE]
"""

import sys

from PIL import Image

import diffoundry

pipe = diffoundry.load(sys.argv[1] if sys.argv[1:] else "build/pico.bundle")
for progress in pipe.steps(diffoundry.Request("a large red star", seed=7, steps=20)):
    if progress.step % 5 == 0:
        pixels = pipe.decode(progress.latents)[0].transpose(1, 2, 0)  # in [-1, 1]
        Image.fromarray(((pixels + 1) * 127.5).clip(0, 255).astype("uint8")).save(f"step-{progress.step}.png")
