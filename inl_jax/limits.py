"""Memory and CPUs that this process may take of the machine, and memory that it returns."""

import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def host_memory(root: Path = ROOT) -> int:
    """Free bytes of this machine's memory, or the lowest limit of this process if that is less.

    A batch system or a container sets the limit of a control group, `ulimit` that of a process.

    Args:
      root: of the file system with `proc` and `sys`.
    """
    return min([_available(root), *_of_groups(root), *_of_process()])


def _available(root: Path) -> int:
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Unlike sysconf, MemAvailable counts page cache that Linux can free.
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    """The limits of this process's control groups and of all above them, versions 1 and 2."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container may not see its own group by this path, only the top.
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            limit = top / group / name
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                yield int(text)


def _of_process() -> Iterator[int]:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft


def return_freed_memory() -> None:
    """Returns memory that this process has freed to the system, where the C library is glibc.

    glibc keeps what is freed in small pieces, such as a compiler's, and large arrays cannot use it.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
