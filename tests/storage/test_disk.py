import errno

import pytest

from inl_jax.failures import DiskFull, MachineFailure
from inl_jax.files import write_text
from inl_jax.storage.disk import write_failure


def raised(error, cause=None):
    """An exception as Orbax passes it on."""
    try:
        try:
            raise cause or error
        except Exception as inner:
            raise error from inner
    except Exception as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left [os_error_code='28']"),
        ValueError("OUT_OF_RANGE: Failed writing: File too large [os_error_code='27']"),
        OSError("Error while serializing: I/O error: No space left on device (os error 28)"),
        raised(RuntimeError("a save failed"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_write_failure_knows_a_full_disk_whatever_wraps_it(tmp_path, error):
    failure = write_failure(error, tmp_path / "run", needed=3 * 2**30)
    assert isinstance(failure, DiskFull) and failure.exit_code == 28
    assert f"{tmp_path}/run: " in str(failure) and "takes 3.00 GiB" in str(failure)
    assert "iB are free" in str(failure) and "\n" not in str(failure)


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (ValueError("RESOURCE_EXHAUSTED: open [os_error_code='24']"), "Too many open files"),
        (ValueError("several\nlines"), "ValueError: several lines"),
    ],
)
def test_write_failure_names_another_reason(tmp_path, error, reason):
    failure = write_failure(error, tmp_path)
    assert type(failure) is MachineFailure and failure.exit_code == 1
    assert f"cannot be written ({reason})" in str(failure)


def test_write_failure_names_the_file_that_could_not_be_replaced(tmp_path):
    (tmp_path / "best.json" / "x").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "best.json", "{}")
    assert str(write_failure(caught.value, tmp_path)).startswith(f"{tmp_path}/best.json: cannot be")
