"""`python -m diffoundry`."""

from .cli import main

main()
