"""Systems that ours is timed against: each a script that answers the questions of `bench/systems.py`.

A script runs in an environment of its own, which `setup` makes: what one needs would not go together with what others
do.
"""

from .peer import PEERS, Peer, command, needs_checkpoint, precisions
from .setup import setup

__all__ = ["PEERS", "Peer", "command", "needs_checkpoint", "precisions", "setup"]
