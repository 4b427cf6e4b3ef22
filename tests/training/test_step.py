import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from flax import linen as nn

from inl_jax.config import MeshConfig
from inl_jax.model import language_model as model
from inl_jax.parallel.sharding import RULES, make_mesh
from inl_jax.training.metrics import MetricsLog
from inl_jax.training.optim import learning_rate_schedule, make_optimizer
from inl_jax.training.state import init_state, make_layout
from inl_jax.training.step import check_fused_attention, compile_step, trace_step, train_step


def stepper(config, num_steps=10):
    """(jitted train_step, first state) outside any loop."""
    optimizer = make_optimizer(config, num_steps)
    schedule = learning_rate_schedule(config, num_steps)
    step = jax.jit(
        lambda s, b: train_step(s, b, config=config, optimizer=optimizer, schedule=schedule)
    )
    return step, init_state(jax.random.key(0), config=config, optimizer=optimizer)


def batches(n, rows=8, seq=16, vocab=257):
    return jax.random.randint(jax.random.key(7), (n, rows, seq + 1), 0, vocab)


@contextlib.contextmanager
def on_mesh(config):
    """Yields what comes before the config's training step: its mesh and abstract state."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh, make_layout(config, mesh)


@pytest.mark.parametrize(
    "param_dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_accumulation_equals_the_big_batch(train_config, param_dtype):
    with jax.enable_x64(param_dtype == "float64"):
        ends = []
        for k in (1, 4):
            config = train_config(model={"param_dtype": param_dtype}, accumulate_steps=k)
            step, state = stepper(config)
            for batch in batches(3):
                state, results = step(state, batch)
            ends.append((state.params, results["loss"], results["grad_norm"]))
        tolerance = {"float64": 1e-9, "bfloat16": 0.05}[param_dtype]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance
            ),
            *ends,
        )


@pytest.mark.parametrize("accumulate_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_nonfinite_update_leaves_parameters_and_optimizer_untouched(
    train_config, accumulate_steps
):
    config = train_config(accumulate_steps=accumulate_steps)
    step, state = stepper(config)
    state, _ = step(state, batches(1)[0])
    state, good = step(state, batches(1)[0])  # the first update has learning rate 0
    params = dict(state.params)
    poisoned = state._replace(
        params=params | {"embedding": params["embedding"].at[3, 0].set(jnp.nan)}
    )
    after, results = step(poisoned, batches(1)[0].at[0, 0].set(3))
    assert not results["finite"] and results["skipped"] == 1 and after.step == state.step + 1
    assert_same((after.params, after.opt_state), (poisoned.params, poisoned.opt_state))
    # Batches that do not touch the bad row of the embedding still see it in the logits; a good
    # state goes on as if nothing had happened, at the learning rate it had reached.
    after, results = step(after._replace(params=state.params), batches(1)[0])
    assert results["finite"] and results["skipped"] == 1
    np.testing.assert_allclose(
        results["learning_rate"], learning_rate_schedule(config, 10)(2), rtol=1e-6
    )
    assert good["finite"] and not jnp.array_equal(after.params["embedding"], params["embedding"])


@pytest.mark.parametrize(
    ("param_dtype", "accumulate_steps", "mesh"),
    [
        ("float32", 1, MeshConfig(data=1)),
        pytest.param("float32", 2, MeshConfig(data=1), marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, MeshConfig(data=1), marks=pytest.mark.slow),
        ("bfloat16", 2, MeshConfig(data=2, fsdp=2, tensor=2)),
    ],
)
def test_the_step_updates_all_of_its_state_in_place(
    train_config, capsys, param_dtype, accumulate_steps, mesh
):
    config = train_config(
        model={"param_dtype": param_dtype}, accumulate_steps=accumulate_steps, mesh=mesh
    )
    with on_mesh(config) as (mesh, abstract):
        log = MetricsLog(config.run_dir)
        compiled = compile_step(config, 10, mesh, abstract, log)
    held = sum(
        np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )
    assert compiled.memory_analysis().alias_size_in_bytes == held
    assert "WARNING" not in capsys.readouterr().out


def test_a_state_that_is_held_twice_is_reported(train_config, monkeypatch, capsys):
    jit = jax.jit

    def without_donation(*args, donate_argnums=(), **kwargs):
        return jit(*args, **kwargs)

    monkeypatch.setattr(jax, "jit", without_donation)
    config = train_config()
    with on_mesh(config) as (mesh, abstract):
        compile_step(config, 10, mesh, abstract, MetricsLog(config.run_dir))
    assert "WARNING: only 0.00 GiB of the state's" in capsys.readouterr().out


@pytest.mark.parametrize("context", ["mean", "decay", "attention"])
def test_the_program_of_the_step_does_not_grow_with_layers_or_iterations(train_config, context):
    def size(**fields):
        config = train_config(model={"context": context, "remat": "block"} | fields)
        with on_mesh(config) as (mesh, abstract):
            return len(trace_step(config, 10, mesh, abstract).lower().as_text())

    small = size(num_layers=2, num_iterations=2)
    assert size(num_layers=6, num_iterations=2) == pytest.approx(small, rel=0.01)
    assert size(num_layers=2, num_iterations=9) == pytest.approx(small, rel=0.01)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_step_for_cuda_runs_attention_forward_and_backward_in_cudnn(
    train_config, monkeypatch, remat
):
    """Lowered for CUDA on any machine: what the compiler is given, not what it makes of it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(model, "cuda_capability", lambda: (9, 0))

    def program(**fields):
        fields |= {"context": "attention", "compute_dtype": "bfloat16", "remat": remat}
        config = train_config(model=fields)
        with on_mesh(config) as (mesh, abstract):
            traced = trace_step(config, 10, mesh, abstract)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    check_fused_attention(program())
    with pytest.raises(RuntimeError, match="in its forward and backward pass .found: none"):
        check_fused_attention(program(attention_kernel="xla"))


def test_a_missing_attention_kernel_is_named():
    forward = 'custom_call_target="__cudnn$fmhaSoftmax"'
    backward = 'custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    check_fused_attention(f"{forward}, x\n{backward}, y")
    with pytest.raises(RuntimeError, match=r"in its backward pass \(found: __cudnn\$fmhaSoftmax\)"):
        check_fused_attention(forward)
    with pytest.raises(RuntimeError, match="in its forward pass .*model.attention_kernel"):
        check_fused_attention(backward)


def test_the_compiled_step_is_checked_for_the_kernel_it_was_to_use(train_config, monkeypatch):
    # The step's checks alone: the model itself uses XLA's.
    monkeypatch.setattr("inl_jax.training.step.attention_kernel", lambda _: "cudnn")
    config = train_config(model={"context": "attention"})
    with on_mesh(config) as (mesh, abstract), pytest.raises(RuntimeError, match="lacks cuDNN"):
        compile_step(config, 10, mesh, abstract, MetricsLog(config.run_dir))
