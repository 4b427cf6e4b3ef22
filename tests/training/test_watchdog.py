import queue
import signal
import threading
from types import SimpleNamespace

import jax
import pytest

from inl_jax.failures import MachineFailure, Stalled
from inl_jax.training import watchdog
from inl_jax.training.reader import Reader
from inl_jax.training.stop import Stopped
from inl_jax.training.watchdog import UPDATE, Watchdog


@pytest.fixture
def ticking(monkeypatch):
    """Makes a watchdog that looks every few milliseconds; returns it and what it ended with."""
    monkeypatch.setattr(watchdog, "TICK", 0.005)
    monkeypatch.setattr(watchdog, "POLL", 0.01)
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.05)
    made = []

    def make(**fields):
        ended = queue.Queue()
        made.append(Watchdog(end=ended.put, **fields))
        return made[-1], ended

    yield make
    for each in made:
        each.close()


@pytest.fixture
def two(monkeypatch):
    """As if this were process 1 of 2."""
    monkeypatch.setattr(watchdog, "OTHERS_SECONDS", 0.1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


@pytest.fixture
def hanging():
    """A reader of a batch that never comes."""
    never = threading.Event()

    def batches():
        never.wait()
        yield

    yield Reader(batches())
    never.set()


NOT_ASKED = SimpleNamespace(requested=None)


def test_stall_is_said_once_with_all_stacks_and_ends_at_the_limit(ticking, capfd):
    dog, ended = ticking(factor=2.0, limit=0.3)
    with dog.during(UPDATE):
        dog.progress()
        message = ended.get(timeout=10)
    assert message.startswith("no progress for 0 s (usually") and "for the devices" in message
    assert "stall_limit=0.3; nothing was saved after the last checkpoint" in message
    err = capfd.readouterr().err
    assert err.count("WARNING: no progress for 0 s") == 1 and "test_stall_is_said_once" in err


@pytest.mark.parametrize("kind", ["a save", "the evaluation"])
def test_stall_names_what_is_waited_for_and_of_several_processes_which_one(ticking, two, kind):
    dog, ended = ticking(factor=0.0, limit=0.1)
    for _ in range(2):  # the first is not judged
        with dog.during(kind):
            pass
    with dog.during(kind):
        message = ended.get(timeout=10)
    assert message.startswith("process 1 of 2: no progress for")
    assert f"waiting for {kind} or other processes" in message


def test_first_of_a_kind_is_not_judged_nor_what_is_not_watched(ticking, monkeypatch):
    dog, ended = ticking(factor=1.0, limit=0.01)
    with pytest.raises(queue.Empty):
        ended.get(timeout=0.2)
    with dog.during("the evaluation"), pytest.raises(queue.Empty):
        ended.get(timeout=0.2)
    monkeypatch.setattr(watchdog, "FIRST_SECONDS", 0.1)
    with dog.during("the evaluation"):
        assert "waiting for the evaluation" in ended.get(timeout=10)


def test_progress_puts_the_end_off(ticking):
    dog, ended = ticking(factor=1.0, limit=0.5)
    with dog.during(UPDATE):
        for _ in range(3):
            for _ in dog.each(range(20)):
                with pytest.raises(queue.Empty):
                    ended.get(timeout=0.01)


def test_process_that_was_stopped_has_not_waited(ticking, monkeypatch):
    """The clock jumps by an hour at each look but one."""
    clock, looks = [0.0], threading.Semaphore(0)

    def jump():
        clock[0] += 3600
        looks.release()
        return clock[0]

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=jump))
    dog, ended = ticking(factor=1.0, limit=1.0)
    with dog.during(UPDATE):
        dog.progress()
        for _ in range(20):
            assert looks.acquire(timeout=10)
    assert ended.empty()


def test_inputs_give_every_batch(ticking):
    dog, _ = ticking(factor=1.0, limit=0.0)
    assert list(dog.inputs(Reader(iter(range(9))), NOT_ASKED)) == list(range(9))


def test_inputs_end_at_the_limit_and_say_that_they_waited_for_input(ticking, hanging):
    dog, ended = ticking(factor=1.0, limit=0.1)
    with dog.during(UPDATE):
        assert list(dog.inputs(hanging, NOT_ASKED)) == []
        assert "waiting for input" in dog.gave_up and ended.empty()
        dog.progress()
        assert dog.gave_up, "the update before has yet to be fetched"


def test_inputs_end_when_a_signal_asks_for_it(ticking, hanging):
    dog, _ = ticking(factor=1.0, limit=0.0)
    assert list(dog.inputs(hanging, SimpleNamespace(requested=signal.SIGTERM))) == []


def test_inputs_of_several_processes_end_all_and_name_the_one_that_waits(
    ticking, hanging, two, capsys
):
    dog, _ = ticking(factor=1.0, limit=0.1)
    with dog.during(UPDATE), pytest.raises(Stalled, match="process 1 of 2.*waiting for input"):
        list(dog.inputs(hanging, NOT_ASKED))
    for number, raised in ((signal.SIGHUP, Stopped), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(raised):
            list(dog.inputs(hanging, SimpleNamespace(requested=number)))
        assert "process 1 of 2: no progress" in capsys.readouterr().err


def test_failure_beside_the_training_is_a_line_and_of_several_processes_ends_them(
    ticking, said, monkeypatch
):
    dog, _ = ticking(factor=1.0, limit=0.0)
    with dog.beside("the evaluation", 4):
        raise ValueError("no\nway")
    assert said == ["WARNING: the evaluation at update 4 failed (ValueError: no)"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(MachineFailure, match=r"process 0: the evaluation at update 4 failed \("),
        dog.beside("the evaluation", 4),
    ):
        raise ValueError("no\nway")
