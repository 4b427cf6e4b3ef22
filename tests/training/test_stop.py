import os
import signal

import pytest

from inl_jax.training.stop import Stopped, StopRequest


def test_stop_request_raises_notes_or_waits_for_the_update(capfd):
    with StopRequest() as stop:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.requested = None
        stop.hold()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.release()
        stop.requested = None
        stop.release()
        stop.enter_loop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGINT
        answer = "stopping after this update, then saving; Ctrl-C again ends at once"
        assert answer in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_hangup_is_a_stop_unless_it_is_ignored_as_under_nohup():
    with StopRequest(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)
