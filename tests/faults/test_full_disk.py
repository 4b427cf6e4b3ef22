"""A disk without space: one line, a code of its own, and the same command resumes."""

import signal
import subprocess

import pytest
from legs import Leg, log_of, temporary_files, tiny_config

from inl_jax.data.corpus import prepare

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of the run on a disk with space."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), num_steps=20)
    assert Leg(config).wait() == [0]
    return log_of(config.run_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk])
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted without being root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    """Fills a file system to the last byte; returns the file that does."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError:
            return path


@pytest.mark.parametrize("then", [None, signal.SIGTERM], ids=["left alone", "SIGTERM"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_a_full_disk_ends_in_a_line_and_resumes_bit_equal(
    small_disk, tmp_path, whole, tell, processes, then
):
    config = tiny_config(tmp_path, num_steps=20, run_dir=str(small_disk / "run"))
    leg = Leg(config, processes=processes, pace=0.2)
    assert leg.grown(), leg.out()
    filler = fill(small_disk)
    if then:
        leg.signal(then)
    assert leg.wait() == [28] * processes, leg.out()
    last = leg.out().rstrip().splitlines()[-1]
    assert str(small_disk) in last and "free" in last and "Traceback" not in leg.out()
    filler.unlink()
    again = Leg(config, processes=processes)
    assert again.wait() == [0] * processes, again.out()
    assert not temporary_files(config.run_dir)
    if processes == 1:
        assert log_of(config.run_dir) == whole
    tell(f"full disk, {processes} process(es), {then and then.name}: exit code 28, then resumed")


def test_a_run_at_its_limit_of_file_size_ends_like_on_a_full_disk(tmp_path, whole, tell):
    config = tiny_config(tmp_path, num_steps=20)
    prepare(config.data)  # its files are larger than the limit
    # 40 blocks of 512 bytes: more than the log takes, less than the arrays of a checkpoint.
    leg = Leg(config, prefix=["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"])
    assert leg.wait() == [28], leg.out()
    assert "Traceback" not in leg.out()
    again = Leg(config)
    assert again.wait() == [0], again.out()
    assert log_of(config.run_dir) == whole
    tell("limit of file size: exit code 28, then resumed bit-equal")
