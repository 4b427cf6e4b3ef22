import io

from inl_jax.tracking.log import LIMIT, copy


def test_copy_keeps_a_log_small_and_free_of_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    printed = io.BytesIO(b"key 0123456789abcdef \xff\n" + 2 * LIMIT * b"x" + b"\n")
    log = io.BytesIO()
    copy(printed, log)
    assert log.getvalue().startswith("key *** \N{REPLACEMENT CHARACTER}\nxxx".encode())
    assert len(log.getvalue()) == LIMIT
    assert not printed.read()  # a tracker that prints more does not wait


def test_copy_goes_on_when_the_disk_is_full():
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    printed = io.BytesIO(b"a\nb\n")
    copy(printed, Full())
    assert not printed.read()
