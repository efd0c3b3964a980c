"""`python -m diffoundry.parity`: every task and option, through diffusers' pipelines and through ours."""

from .pipelines import main

main()
