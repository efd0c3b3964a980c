"""A callback after each step, which may also end the run by returning False.

python examples/callback.py [BUNDLE]
"""

import sys

import diffoundry

pipe = diffoundry.load(sys.argv[1] if sys.argv[1:] else "build/pico.bundle")
try:
    pipe("a ring", seed=1, callback=lambda step, total, latents: print(step, "of", total) or step < 5)
except diffoundry.StoppedError as stopped:
    print(stopped)
