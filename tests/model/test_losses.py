import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import MeshConfig
from inl_jax.model import losses
from inl_jax.model.losses import chunk_tokens, mean_loss, token_losses
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import RULES, make_mesh

V, D, B, S = 40, 16, 4, 14
CHUNKS = [0, 1, 5 * B, 1000]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_columns(monkeypatch):
    monkeypatch.setattr(losses, "COLUMNS", 4)


def full_logits(params, hidden, targets):
    """The definition, in one piece, left to automatic differentiation."""
    log_probs = jax.nn.log_softmax(hidden @ params["embedding"].T)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def inputs(dtype=jnp.float32, batch=B, positions=S, width=D, vocab=V):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"embedding": jax.random.normal(keys[0], (vocab, width), dtype)}
    hidden = jax.random.normal(keys[1], (batch, positions, width), dtype)
    return params, hidden, jax.random.randint(keys[2], (batch, positions), 0, vocab)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_losses_follow_the_definition(chunk):
    with jax.enable_x64(True):
        found = token_losses(*inputs(jnp.float64), chunk=chunk)
        np.testing.assert_allclose(found, full_logits(*inputs(jnp.float64)), rtol=1e-12)


@pytest.mark.parametrize(
    "chunk", [pytest.param(0, marks=SLOW), 1, 5 * B, pytest.param(1000, marks=SLOW)]
)
@pytest.mark.parametrize("loss", [mean_loss, lambda *a, **k: token_losses(*a, **k).mean()])
def test_loss_gradients_are_exact(chunk, loss):
    def both(dtype):
        params, hidden, targets = inputs(dtype)
        scaled = lambda p, h: 3 * loss(p, h, targets, chunk=chunk)  # noqa: E731
        wanted = lambda p, h: 3 * full_logits(p, h, targets).mean()  # noqa: E731
        return (jax.jit(jax.value_and_grad(f, (0, 1)))(params, hidden) for f in (scaled, wanted))

    with jax.enable_x64(True):
        for a, b in zip(*map(jax.tree.leaves, both(jnp.float64)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
    for a, b in zip(*map(jax.tree.leaves, both(jnp.float32)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_losses_do_not_depend_on_the_device_they_are_made_for():
    """GPUs pad the vocabulary; the padding has no share in losses and gradients."""

    def both(loss):
        params, hidden, targets = inputs()
        return jax.value_and_grad(lambda p, h: loss(p, h, targets).mean(), (0, 1))(params, hidden)

    for loss in (mean_loss, token_losses):
        wanted = both(loss)
        with made_for(H100):
            found = both(loss)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted
        )


def test_chunk_tokens_decides_by_device_and_vocabulary():
    assert chunk_tokens("auto", 50257, 10**6) == 256
    assert chunk_tokens("auto", 65, 2048) == 2048
    with made_for(H100):
        assert chunk_tokens("auto", 50257, 10**6) == 2048
        assert chunk_tokens("auto", 256_000, 10**6) == 524
        assert chunk_tokens("auto", 50257, 100) == 100
    assert chunk_tokens(0, 50257, 10**6) == 10**6
    assert chunk_tokens(7, 50257, 10**6) == 7


def test_mean_loss_adds_bfloat16_products_in_float32():
    """The embedding's gradient must not lose what one more chunk adds."""
    params, hidden, targets = inputs(positions=256)
    wanted = jax.grad(lambda p: mean_loss(p, hidden, targets))(params)["embedding"]
    narrow = hidden.astype(jnp.bfloat16)
    found = jax.grad(lambda p: mean_loss(p, narrow, targets, chunk=B))(params)["embedding"]
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)


def sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for sub in jaxprs_in_params(eqn.params):
            yield from sizes(sub)


@pytest.mark.parametrize("batch, positions", [(1, 64), (8, 8)])
def test_mean_loss_makes_no_array_of_all_logits(batch, positions):
    params, hidden, targets = inputs(batch=batch, positions=positions, vocab=500)

    def largest(loss):
        program = jax.make_jaxpr(jax.grad(lambda p, h: loss(p, h, targets), (0, 1)))(params, hidden)
        return max(sizes(program.jaxpr))

    assert largest(functools.partial(mean_loss, chunk=16)) == 16 * 500
    assert largest(lambda *a: full_logits(*a).mean()) == 64 * 500


def test_mean_loss_saves_temporary_memory_at_the_size_of_gpt2s_vocabulary(monkeypatch):
    """Read from the compiled program; nothing is allocated."""
    monkeypatch.undo()
    shapes = {"embedding": jax.ShapeDtypeStruct((50257, 256), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((1, 4096, 256), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def temporary(loss):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return gradient.lower(shapes, hidden, targets).compile().memory_analysis()

    chunked = temporary(mean_loss).temp_size_in_bytes
    plain = temporary(lambda *a: full_logits(*a).mean()).temp_size_in_bytes
    assert plain >= 5 * chunked, (plain, chunked)


COLLECTIVE = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-reduce|all-gather|reduce-scatter)")


@pytest.mark.parametrize(
    "data, fsdp, tensor",
    [(2, 2, 2), *(pytest.param(*m, marks=SLOW) for m in ((8, 1, 1), (1, 8, 1)))],
)
def test_mean_loss_exchanges_the_gradient_once(data, fsdp, tensor):
    """Results equal those of one device; in the loop, devices exchange nothing of its size."""
    params, hidden, targets = inputs(batch=8, positions=32, width=32, vocab=512)
    wanted = jax.value_and_grad(mean_loss, (0, 1))(params, hidden, targets)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    by_rows = NamedSharding(mesh, P(("data", "fsdp")))
    shardings = ({"embedding": NamedSharding(mesh, P("tensor", "fsdp"))}, by_rows)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        arguments = (*jax.device_put((params, hidden), shardings), jax.device_put(targets, by_rows))
        gradient = jax.jit(
            jax.value_and_grad(functools.partial(mean_loss, chunk=8), (0, 1)),
            out_shardings=(NamedSharding(mesh, P()), shardings),
        )
        program = gradient.lower(*arguments).compile()
        found = program(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
    text = program.as_text()
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert bodies, "no loop in the program"
    for computation in text.split("\n\n"):
        name = re.match(r"\s*%?([\w.-]+)", computation)
        if name and name[1] in bodies:
            for _, shape in COLLECTIVE.findall(computation):
                size = math.prod(map(int, filter(None, shape.split(","))))
                assert size < 512 * 32 / (8 * tensor), shape
