import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from inl_jax.model.language_model import init_params


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-10), ("float32", 1e-5)],
)
@pytest.mark.slow
def test_torch_block_computes_what_ours_computes(benchmark, model_config, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    harness, reference = benchmark("harness"), benchmark("torch_reference")
    config = model_config(
        context="mean", num_layers=1, param_dtype=dtype, compute_dtype=dtype, num_iterations=4
    )
    with jax.enable_x64(dtype == "float64"):
        params = init_params(config, jax.random.key(0))
        # Away from the special values at the start: zeros, and equal coefficients.
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda p: p + np.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), params
        )
        block = jax.tree.map(lambda p: p[0], params["blocks"])
        x, dy = rng.standard_normal((2, 2, 9, config.d_model)).astype(dtype)
        function = harness.with_gradient(harness.block_fn(config))
        y, (grads, dx) = jax.jit(function)(dy, block, x)
        theirs = reference.load_block(params, config)
        tensor = torch.tensor(x, requires_grad=True)
        out = theirs(tensor)
        out.backward(torch.tensor(dy))
        compare = functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance)
        compare(out.detach(), y)
        compare(tensor.grad, dx)
        grads = params | {"blocks": jax.tree.map(lambda g: g[None], grads)}
        ours = reference.block_weights(grads, config)
        assert len(ours) == len(list(theirs.parameters())) == 29
        for name, parameter in theirs.named_parameters():
            compare(parameter.grad, ours[name], err_msg=name)
