"""Plans in fp16 for RTX cards that are not here, on a CPU: copy the bundle to them afterwards.

pip install 'diffoundry[build,rtx]'
python examples/build_elsewhere.py [BUNDLE]
"""

import sys

import diffoundry

bundle = sys.argv[1] if sys.argv[1:] else "build/pico.bundle"
target = diffoundry.Target(archs=("sm89", "sm120"), sizes=((64, 64),), batch=(1, 4))
made = diffoundry.build(bundle, engine="tensorrt-rtx", precision="fp16", target=target)
print(made.manifest.engine, made.manifest.precision)
