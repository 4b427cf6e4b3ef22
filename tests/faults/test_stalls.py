"""A batch that never comes: the run says so, saves what it can, and ends with a code of its own."""

import signal
import time

import pytest
from legs import Leg, log_of, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.faults]

LIMIT, AT = 5.0, 7  # seconds, batch


def test_a_run_whose_reader_stalls_saves_and_ends_and_resumes_bit_equal(tmp_path, tell):
    config = tiny_config(tmp_path, num_steps=10, stall_limit=LIMIT)
    leg = Leg(config, stalls=[AT])
    assert leg.wait() == [110]
    assert "waiting for input" in leg.out() and 'File "' in leg.out(), "the stacks"
    assert f"update {AT - 1} is saved" in leg.out().splitlines()[-1]
    assert Leg(config).wait() == [0]
    (tmp_path / "whole").mkdir()
    whole = tiny_config(tmp_path / "whole", num_steps=10)
    assert Leg(whole).wait() == [0]
    assert log_of(config.run_dir) == log_of(whole.run_dir)
    tell("one process, its reader stalled: exit code 110, saved; resumed bit-equal")


def test_a_signal_ends_a_run_whose_reader_stalls(tmp_path, tell):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        (tmp_path / str(number)).mkdir()
        leg = Leg(tiny_config(tmp_path / str(number), num_steps=10), stalls=[AT])
        while f"update {AT - 1}/" not in leg.out() and "saved 6" not in leg.out():
            time.sleep(0.1)
            assert leg.all[0].poll() is None, leg.out()
        leg.signal(number)
        assert leg.wait() == [75], leg.out()
        assert f"stopped at update {AT - 1} as asked" in leg.out()
    tell("SIGTERM, Ctrl-C, SIGHUP while a reader stalls: exit code 75, saved")


@pytest.mark.parametrize("stalled", [0, 1])
def test_two_processes_end_in_time_if_the_reader_of_one_stalls(tmp_path, tell, stalled):
    config = tiny_config(tmp_path, num_steps=10, stall_limit=LIMIT)
    stalls = [AT * (i == stalled) for i in range(2)]
    leg = Leg(config, processes=2, stalls=stalls)
    codes = leg.wait()
    assert codes == [110, 110], leg.out(0) + leg.out(1)
    assert f"process {stalled} of 2" in leg.out(0) + leg.out(1)
    again = Leg(config, processes=2)
    assert again.wait() == [0, 0] and "resuming from update" in again.out()
    tell(f"two processes, the reader of process {stalled} stalled: both exit code 110; resumed")
