"""Random damages of a checkpoint: none of them is loaded in silence."""

import random
import shutil
from collections import Counter

import jax
import pytest
from conftest import assert_same
from damages import damage

from inl_jax.config import InputError
from inl_jax.model.language_model import init_params
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.run_dir import record_run
from inl_jax.storage.weights import read_params

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DAMAGES, SEED = 2_000, 15


@pytest.fixture
def saved(tmp_path, train_config):
    """A run with checkpoints at updates 1 and 2, and their parameters."""
    from inl_jax.tokens.tokenizer import load_tokenizer

    config = train_config(model={"num_layers": 1}, run_dir=str(tmp_path / "saved"))
    record_run(config, load_tokenizer("bytes"))
    checkpoints = Checkpoints(config.run_dir, keep_last=2)
    params = {step: init_params(config.model, jax.random.key(step)) for step in (1, 2)}
    for step, tree in params.items():
        checkpoints.save(step, tree, tree, position={"samples_seen": step})
    checkpoints.close()
    return config, params


def restored(run_dir, params):
    """(state, step) that training would resume from."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), params)
    checkpoints = Checkpoints(run_dir, keep_last=2)
    try:
        found = checkpoints.restore({"params": abstract, "optimizer": abstract})
    finally:
        checkpoints.close()
    assert found["position"] == {"samples_seen": found["step"]}
    assert_same(found["params"], found["optimizer"])
    return found["params"], found["step"]


def test_no_damage_of_a_checkpoint_is_loaded_in_silence(saved, tmp_path, said, tell):
    config, params = saved
    rng, outcomes, kinds = random.Random(SEED), Counter(), Counter()
    for i in range(DAMAGES):
        run_dir = tmp_path / str(i)
        shutil.copytree(config.run_dir, run_dir)
        what = damage(run_dir / "checkpoints" / "2", rng).what
        said.clear()
        try:
            if i % 2:
                found, step = restored(run_dir, params[1])
            else:
                step, found = read_params(run_dir, config.model)
        except InputError as error:
            assert "\n" not in str(error), what
            outcomes["refused in a line"] += 1
        else:
            assert_same(found, params[step])
            # The part that was damaged may be one that is not read, such as the optimizer's.
            assert said or i % 2 == 0, what
            outcomes["the older step read" if step == 1 else "read whole"] += 1
        kinds[what.split()[0]] += 1
        shutil.rmtree(run_dir)
    figures = ", ".join(f"{outcome} {n}" for outcome, n in sorted(outcomes.items()))
    tell(f"{DAMAGES:,} damages of a checkpoint of {len(kinds)} kinds: 0 silent ({figures})")
