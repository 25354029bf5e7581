import os
import signal

import pytest

from utils.signals import Stopped, StopSignal


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_remembered(name):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    stop = StopSignal()
    stop.immediate = False
    assert not stop
    stop.raise_if_received()
    os.kill(os.getpid(), getattr(signal, name))
    assert stop
    with pytest.raises(Stopped, match=name):
        stop.raise_if_received()


def test_before_there_is_anything_to_save_a_signal_stops_at_once():
    StopSignal()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_in_the_background_of_a_shell_script_goes_on_ignoring_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopSignal()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_while_it_waits_a_run_stops_at_once():
    stop = StopSignal()
    stop.immediate = False
    with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.immediate
    with pytest.raises(Stopped), stop.at_once():  # received before it began to wait
        raise AssertionError
    assert not issubclass(Stopped, Exception)  # or else `except Exception` would hold it up
