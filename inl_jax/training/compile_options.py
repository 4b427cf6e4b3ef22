"""XLA's options for programs that would take longer to compile than all their runs can win back."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

SMALL = 10**7
"""Parameters of the largest model whose training step is compiled quickly."""


def compile_options(mesh: Mesh, num_params: int, *, once: bool = False) -> dict[str, Any]:
    """Options for the training step of a model of so many parameters, or for what runs once.

    On CPUs they compile a small program in two thirds of the time. It is about as fast; those of
    larger models may be a tenth slower. What runs once and is small takes half of that again to
    compile, and three times as long to run. A GPU's programs take XLA's own options.
    """
    on_cpu, small = mesh.devices.flat[0].platform == "cpu", num_params <= SMALL
    if not on_cpu or not (once or small):
        return {}
    level = 0 if once and small else 1
    options = {"xla_backend_optimization_level": level, "xla_cpu_use_fusion_emitters": False}
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Whether this XLA has the option: they come and go."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
