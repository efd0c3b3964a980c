import signal

import pytest

from diffoundry.common.interrupts import noting_interrupts


@pytest.fixture(autouse=True)
def usual():
    """A job in the background ignores interrupts, so the tests might."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Ended:
    """What is raised while it ends is dropped by Python."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_loses_is_heeded_by_all_who_wait_for_one():
    with noting_interrupts() as outer:
        with noting_interrupts() as inner:
            inner.heed()
            assert not inner
            Ended()
            with pytest.raises(KeyboardInterrupt):
                inner.heed()
        with pytest.raises(KeyboardInterrupt):
            outer.heed()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_is_not_lost_is_raised_where_it_came():
    with pytest.raises(KeyboardInterrupt), noting_interrupts():
        signal.raise_signal(signal.SIGINT)


def test_where_interrupts_are_ignored_they_still_are():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with noting_interrupts() as came:
        signal.raise_signal(signal.SIGINT)
        came.heed()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
