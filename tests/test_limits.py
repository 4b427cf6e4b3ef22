import os
import platform
import resource
from pathlib import Path

import pytest

from inl_jax import limits

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Makes a root with 8 GiB free, the lines of /proc/self/cgroup, and limits by their files."""

    def make(groups, files):
        of_proc = {
            "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n",
            "proc/self/cgroup": groups,
        }
        for name, text in (of_proc | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


JOB = "system.slice/slurmstepd.scope/job_7/step_0"


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        ("0::/\n", {}, 8),
        (f"0::/{JOB}\n", {f"sys/fs/cgroup/{JOB}/memory.max": "max\n"}, 8),
        (f"0::/{JOB}\n", {f"sys/fs/cgroup/{JOB}/memory.max": f"{3 * GIB}\n"}, 3),
        (
            f"0::/{JOB}\n",
            {
                f"sys/fs/cgroup/{JOB}/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/system.slice/memory.max": f"{2 * GIB}\n",
            },
            2,
        ),
        ("0::/docker/not/seen\n", {"sys/fs/cgroup/memory.max": f"{4 * GIB}\n"}, 4),
        (
            "4:memory:/slurm/uid_1/job_7\n1:name=systemd:/x\n0::/\n",
            {
                "sys/fs/cgroup/memory/slurm/uid_1/job_7/memory.limit_in_bytes": f"{5 * GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            5,
        ),
        ("4:cpu,memory:/a:b\n", {"sys/fs/cgroup/memory/a:b/memory.limit_in_bytes": f"{GIB}"}, 1),
    ],
    ids=["none", "max", "own", "above", "container", "version 1", "colon"],
)
def test_host_memory_is_the_lowest_limit_of_the_groups_of_this_process(
    machine, groups, files, found
):
    assert limits.host_memory(machine(groups, files)) == found * GIB


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_host_memory_heeds_the_limits_of_the_process(machine, monkeypatch, kind):
    def getrlimit(asked):
        soft = GIB if asked == getattr(resource, kind) else resource.RLIM_INFINITY
        return soft, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    assert limits.host_memory(machine("0::/\n", {})) == GIB


def test_usable_cpus_are_those_that_the_process_is_bound_to(monkeypatch):
    assert limits.usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert limits.usable_cpus() == os.cpu_count()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no malloc_trim")
def test_return_freed_memory_returns_what_lies_between_small_pieces():
    def resident():
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    pieces = [b"x" * 2**14 for _ in range(2**11)]
    del pieces[:-1]  # the last one lies above the others
    before = resident()
    limits.return_freed_memory()
    assert resident() < before - 2**24
