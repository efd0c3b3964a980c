"""A loaded pipeline in other processes: after a fork it draws the same, and nothing waits."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

import diffoundry
from diffoundry.common.errors import EngineError

FORKS = """
import gc, multiprocessing, os, sys
import numpy as np
import diffoundry

def draw(pipe):
    asked = dict(steps=2, width=32, height=32, seed=1, guidance=4.0, scheduler="ddim", output="latent")
    return pipe("a red star", **asked).latents

def child(pipe, wanted, queue):
    queue.put(float(np.abs(draw(pipe) - wanted).max()))

def ended(work):
    pid = os.fork()
    if pid == 0:
        sys.exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

context = multiprocessing.get_context("fork")
for threads in (1, 2):
    unused = diffoundry.load(sys.argv[1], threads=threads)
    pipe = diffoundry.load(sys.argv[1], threads=threads)
    wanted = draw(pipe)
    queue = context.Queue()
    process = context.Process(target=child, args=(pipe, wanted, queue))
    process.start()
    assert queue.get() == 0
    process.join()

    def again():
        assert (draw(pipe) == wanted).all()
        return ended(lambda: 0 if (draw(pipe) == wanted).all() else 9) or 3

    def dropped():
        global pipe
        pipe.release_all()
        del pipe
        gc.collect()
        return 4

    found = [ended(again), ended(dropped), ended(lambda: 5), ended(lambda: draw(unused) is None)]
    assert found == [3, 4, 5, 0], found
    assert (draw(pipe) == wanted).all()
print("drawn")
"""


def test_a_forked_process_draws_the_same_and_ends(bundle_of):
    line = [sys.executable, "-c", FORKS, str(bundle_of("pico"))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "drawn\n"), done.stderr


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_pipeline_is_not_sent_or_copied(send, bundle_of):
    with pytest.raises(EngineError, match="load the bundle there"):
        send(diffoundry.load(bundle_of("pico")))
