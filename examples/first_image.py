"""The first image: a prompt, a seed, a picture.

python examples/first_image.py [BUNDLE]
"""

import sys

import diffoundry

pipe = diffoundry.load(sys.argv[1] if sys.argv[1:] else "build/pico.bundle")
result = pipe("a large red star at the left on a navy background", seed=7, num_inference_steps=20)
result.images[0].save("first.png")
