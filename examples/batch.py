"""Requests with samplers, steps and guidance of their own in one batch; each gives the image that it gives alone.

python examples/batch.py [BUNDLE]
"""

import sys

import diffoundry
from diffoundry import Guidance, Request

pipe = diffoundry.load(sys.argv[1] if sys.argv[1:] else "build/pico.bundle")
star = Request("a large red star", seed=7, steps=20, scheduler="dpm++2m")
ring = Request("a small white ring", seed=1, steps=8, scheduler="euler_a", guidance=Guidance(4.0))
for name, result in zip(("star", "ring"), pipe.generate_many([star, ring]), strict=True):
    result.images[0].save(f"{name}.png")
