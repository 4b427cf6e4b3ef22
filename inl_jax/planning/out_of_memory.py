"""What to do when memory runs out although the estimate said that it would not."""

import contextlib
from collections.abc import Iterator

from inl_jax.config import TrainConfig
from inl_jax.console import first_line, size
from inl_jax.failures import OutOfMemory, is_out_of_memory
from inl_jax.planning.memory import memory_found, memory_needed, shares_host
from inl_jax.planning.memory_advice import memory_advice
from inl_jax.planning.preflight import Plan


@contextlib.contextmanager
def explained(asked: TrainConfig, plan: Plan) -> Iterator[None]:
    """Turns an error for want of memory in the block into one line with the smallest change.

    Args:
      asked: the run as its config file and command line say.
      plan: how it is laid out.

    Raises:
      OutOfMemory: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        needed, (found, _) = memory_needed(*plan), memory_found(plan.mesh)
        usable = 0.9 * min(needed.device_bytes, found)  # the estimate was too low
        advice = memory_advice(asked, plan.mesh, usable, shared=shares_host(plan.mesh))
        raise OutOfMemory(
            f"{asked.name} ran out of memory ({first_line(error)}); the estimate for each device "
            f"is {size(needed.device_bytes)} ({needed.by_part()}): {advice}"
        ) from error
