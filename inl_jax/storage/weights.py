"""The weights of a saved step, read without the optimizer."""

from pathlib import Path
from typing import Any

import jax

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import say
from inl_jax.guest import own_logging
from inl_jax.model.language_model import abstract_params
from inl_jax.orbax import ocp
from inl_jax.parallel.sharding import with_shardings
from inl_jax.storage.audit import choose_steps
from inl_jax.storage.disk import reason_of
from inl_jax.storage.identity import CONFIG_NAME, check_config, steps_on_disk
from inl_jax.storage.manifest import disappears, verify
from inl_jax.storage.run_dir import read_config
from inl_jax.storage.shapes import check_shapes


@own_logging()
def read_params(
    run_dir: str | Path, config: ModelConfig, *, step: int | str = "latest", shardings: Any = None
) -> tuple[int, Any]:
    """The parameters of a saved step, without the optimizer: (step, params).

    A training beside it may delete checkpoints meanwhile: "latest" and "best" then look again.

    Args:
      run_dir: the run.
      config: its model.
      step: a saved step, "latest", or "best" (by validation loss).
      shardings: one for each parameter; all on the default device if None.

    Raises:
      InputError: no such checkpoint, or it is damaged, or does not fit the config or the run.
    """
    run_dir = Path(run_dir).absolute()
    abstract = abstract_params(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    abstract = with_shardings(abstract, shardings)
    while True:
        (chosen,) = choose_steps(run_dir, step)
        where = run_dir / "checkpoints" / str(chosen)
        try:
            remark = verify(where, without="optimizer")
            if (run_dir / CONFIG_NAME).is_file():
                copy = f"copy {where / CONFIG_NAME} over it"
                check_config(where, read_config(run_dir), of=run_dir / CONFIG_NAME, advice=copy)
            saved = ocp.checkpointables_metadata(where).metadata
            check_shapes(saved, {"params": abstract}, where)
            params = ocp.load_checkpointables(where, {"params": abstract})["params"]
        except Exception as error:
            if disappears(where):
                continue
            if isinstance(error, InputError):
                raise
            others = [str(other) for other in steps_on_disk(run_dir) if other != chosen]
            advice = f"name another: {', '.join(others)}" if others else "restore it from a copy"
            raise InputError(f"{where} is damaged ({reason_of(error)}); {advice}") from error
        if remark:
            say(f"{where} {remark}")
        return chosen, params
