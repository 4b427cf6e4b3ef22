"""How a command ends: its exit codes, and failures of the machine that have one of their own.

Mistakes in the input are `checks.InputError`.
"""

import errno

EXIT_FAILED = 1
EXIT_MISTAKE = 2  # in the input
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the same command resumes
EXIT_CTRL_C = 130  # nothing more was saved


class Diverged(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


class MachineFailure(RuntimeError):
    """The machine failed, not the run: one line that says what to do, then the same command."""

    exit_code = EXIT_FAILED


class OutOfMemory(MachineFailure):
    """The step does not fit into the memory of the device or the host."""

    exit_code = errno.ENOMEM  # 12


class DiskFull(MachineFailure):
    """A file could not be written: no space, or no quota."""

    exit_code = errno.ENOSPC  # 28


class Stalled(MachineFailure):
    """No update was finished for too long: a reader, a device or another process stalls."""

    exit_code = errno.ETIMEDOUT  # 110


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had not enough memory, as Python, C++ or XLA says."""
    of_xla = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError) or of_xla or "std::bad_alloc" in str(error)
