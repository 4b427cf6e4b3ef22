import threading

import pytest

from inl_jax.training.reader import Reader


def test_reader_gives_all_batches_in_order_and_then_stops():
    reader = Reader(iter(range(50)))
    assert [reader.next(10) for _ in range(50)] == list(range(50))
    with pytest.raises(StopIteration):
        reader.next(10)


def test_reader_loses_no_batch_to_a_wait_that_was_given_up():
    go = threading.Event()

    def slow():
        yield 0
        go.wait()
        yield 1

    reader = Reader(slow())
    assert reader.next(10) == 0
    with pytest.raises(TimeoutError):
        reader.next(0.01)
    go.set()
    assert reader.next(10) == 1


def test_reader_raises_what_reading_raised():
    def broken():
        yield 0
        raise OSError("gone")

    reader = Reader(broken())
    assert reader.next(10) == 0
    with pytest.raises(OSError, match="gone"):
        reader.next(10)


def test_closed_reader_ends_what_it_reads():
    ended = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            ended.set()

    reader = Reader(endless())
    reader.next(10)
    reader.close()
    assert ended.wait(10)
