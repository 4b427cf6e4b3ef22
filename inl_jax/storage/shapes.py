"""Whether the arrays of a checkpoint are those that a config asks for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from inl_jax.config import InputError


def check_shapes(saved: Any, wanted: Any, where: Path) -> None:
    """Raises `InputError` naming the first leaf that is missing or has another shape or type.

    Raises `OSError` if the bytes of the metadata are bad: Orbax then gives None, not an error.
    """

    def leaves(tree):
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf)
            for path, leaf in flat
        }

    for name in wanted:
        if saved.get(name) is None:
            raise OSError(f"the metadata of {name} cannot be read")
        found, asked = leaves(saved[name]), leaves(wanted[name])
        for leaf in [*asked, *found]:
            if found.get(leaf) != asked.get(leaf):
                weights_alone = " with init_from, which takes the weights alone"
                raise InputError(
                    f"{where}: {name}/{leaf} is saved as {found.get(leaf, 'nothing')}, this config "
                    f"wants {asked.get(leaf, 'nothing')}: use the config of that run, or another "
                    f"run_dir{weights_alone if name == 'optimizer' else ''}"
                )


def _kind(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
