import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import MeshConfig
from inl_jax.model.params import (
    by_row_shard,
    current_batch_shards,
    declare,
    gathered,
    join_positions,
    split_positions,
)
from inl_jax.parallel.sharding import RULES, make_mesh


class Doubled(nn.Module):
    """Declares one bfloat16 parameter, used in float32."""

    @nn.compact
    def __call__(self):
        ones = nn.initializers.ones
        axes = ("embed", "mlp")
        w = declare(self, "w", ones, (4, 8), axes, param_dtype="bfloat16", dtype="float32")
        return 2 * w


def test_declare_names_the_axes_stores_and_casts():
    boxed = Doubled().init(jax.random.key(0))["params"]["w"]
    assert boxed.names == ("embed", "mlp")
    assert boxed.value.shape == (4, 8) and boxed.value.dtype == jnp.bfloat16
    used = Doubled().apply({"params": {"w": boxed.value}})
    assert used.dtype == jnp.float32 and (used == 2).all()


def test_gathered_shards_the_gradient_like_the_parameter():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    kept = NamedSharding(mesh, P("fsdp", None))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        w = jax.device_put(jnp.ones((16, 8)), kept)
        used = jax.jit(lambda w: gathered(w, ("embed", "mlp")))(w)
        gradient = jax.jit(jax.grad(lambda w: (gathered(w, ("embed", "mlp")) ** 2).sum()))(w)
    assert used.sharding.is_fully_replicated
    assert gradient.sharding.is_equivalent_to(kept, 2)
    np.testing.assert_array_equal(gradient, 2 * w)


def test_current_batch_shards_counts_the_shards_that_divide_the_rows():
    assert current_batch_shards(16) == 1, "there is no mesh"
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert current_batch_shards(16) == 1, "no rule names the batch axis"
        with nn.logical_axis_rules(RULES):
            assert [current_batch_shards(rows) for rows in (16, 4, 6, 1)] == [4, 4, 1, 1]


def test_by_row_shard_keeps_the_order_of_rows():
    rows = jnp.arange(12).reshape(6, 2)
    parts = by_row_shard({"a": rows}, 3)["a"]
    assert parts.shape == (3, 2, 2)
    np.testing.assert_array_equal(parts.reshape(6, 2), rows)


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
def test_join_positions_inverts_split_positions(chunk):
    a = 1 + jnp.arange(2 * 7 * 3).reshape(2, 7, 3)
    parts = split_positions(a, chunk)
    n = -(-7 // chunk)
    assert parts.shape == (n, 2, chunk, 3)
    np.testing.assert_array_equal(join_positions(parts, 7), a)
    np.testing.assert_array_equal(parts[0, :, : min(chunk, 7)], a[:, :chunk])
    assert (parts != 0).sum() == a.size, "padding is zero"
