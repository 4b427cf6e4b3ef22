import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import MeshConfig
from inl_jax.model import language_model
from inl_jax.model.layers import feed_forward
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh, on
from inl_jax.training import spikes
from inl_jax.training.optim import make_optimizer
from inl_jax.training.state import init_state, make_layout
from inl_jax.training.step import (
    check_fused_attention,
    compile_step,
    trace_step,
    train_step,
    why_skipped,
)

RATE = np.float32(1e-2)
SMALL = {"num_layers": 1, "num_iterations": 1}  # compiles faster


def stepper(config):
    """(jitted train_step, first state) outside any loop."""
    optimizer = make_optimizer(config)
    step = jax.jit(lambda s, b: train_step(s, b, RATE, config=config, optimizer=optimizer))
    return step, init_state(jax.random.key(0), config=config)


def batches(n, rows=8, seq=16, vocab=257):
    return jax.random.randint(jax.random.key(7), (n, rows, seq + 1), 0, vocab)


def traced(config):
    """The training step of a config on its mesh, traced."""
    mesh = make_mesh(config.mesh)
    config = fit_to_mesh(config, mesh)
    with on(mesh):
        return trace_step(config, mesh, make_layout(config, mesh))


def compiled(config):
    """The training step of a config on its mesh, compiled and checked; and its layout."""
    mesh = make_mesh(config.mesh)
    config = fit_to_mesh(config, mesh)
    with on(mesh):
        layout = make_layout(config, mesh)
        return compile_step(config, mesh, layout), layout


@pytest.mark.slow
def test_step_and_first_state_trace_no_block_in_vain(train_config, monkeypatch):
    blocks = []
    count = lambda *args: (blocks.append(1), feed_forward(*args))[1]  # noqa: E731
    monkeypatch.setattr(language_model, "feed_forward", count)
    config = train_config(model=SMALL | {"d_ff": 36, "dropout": 0.0})  # of no other test
    mesh = make_mesh(config.mesh)
    layout = make_layout(config, mesh)
    with on(mesh):
        trace_step(config, mesh, layout)
        for_layout_and_step = len(blocks)
        first = lambda seed: init_state(jax.random.key(seed), config=config)  # noqa: E731
        jax.jit(first).trace(np.uint32(0))
    assert for_layout_and_step == 3  # flax traces the loop over layers twice, if it is to draw
    assert len(blocks) == 3, "the first state has been traced for the layout"


@pytest.mark.parametrize(
    "param_dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_micro_batches_give_the_update_of_the_whole_batch(train_config, param_dtype):
    with jax.enable_x64(param_dtype == "float64"):
        ends = []
        for k in (1, 4):
            config = train_config(model=SMALL | {"param_dtype": param_dtype}, accumulate_steps=k)
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
def test_train_step_skips_a_nonfinite_update_bit_for_bit(train_config, accumulate_steps):
    config = train_config(model=SMALL, accumulate_steps=accumulate_steps)
    step, state = stepper(config)
    state, good = step(state, batches(1)[0])
    params = dict(state.params)
    poisoned = state._replace(
        params=params | {"embedding": params["embedding"].at[3, 0].set(jnp.nan)}
    )
    after, results = step(poisoned, batches(1)[0].at[0, 0].set(3))
    assert not results["finite"] and results["skipped"] == 1 and after.step == state.step + 1
    assert_same((after.params, after.opt_state), (poisoned.params, poisoned.opt_state))
    # Batches that do not touch the bad row of the embedding still see it in the logits; a good
    # state continues as if nothing had happened.
    after, results = step(after._replace(params=state.params), batches(1)[0])
    assert results["finite"] and results["skipped"] == 1
    assert good["finite"] and not jnp.array_equal(after.params["embedding"], params["embedding"])


def test_train_step_skips_a_spike_bit_for_bit_and_says_why(train_config):
    config = train_config(model=SMALL, optim={"skip_spikes": 3.0})
    step, state = stepper(config)
    batch = batches(1)[0]
    window = spikes.Window(jnp.full(spikes.WINDOW, 0.1), jnp.int32(spikes.WINDOW), jnp.int32(0))
    state = state._replace(opt_state=state.opt_state | {"spikes": window})
    after, results = step(state, batch)
    assert results["spike"] and results["finite"] and results["skipped"] == 1
    before = state.opt_state | {"spikes": window._replace(in_a_row=jnp.int32(1))}
    assert_same((after.params, after.opt_state), (state.params, before))
    values = {name: value.item() for name, value in results.items()}
    norm = values["grad_norm"]
    assert why_skipped(values) == (
        f"a spike, gradient norm {norm:.3g} is {norm / 0.1:.1f} times the median 0.1"
    )
    usual = window._replace(norms=jnp.full(spikes.WINDOW, norm))
    after, results = step(state._replace(opt_state=state.opt_state | {"spikes": usual}), batch)
    assert not results["spike"] and results["skipped"] == 0
    assert not jnp.array_equal(after.params["embedding"], state.params["embedding"])
    assert after.opt_state["spikes"].accepted == spikes.WINDOW + 1


def test_state_and_layout_have_a_window_only_if_spikes_are_skipped(train_config):
    for multiple, parts in ((0.0, {"blocks", "rest"}), (9.0, {"blocks", "rest", "spikes"})):
        config = train_config(optim={"skip_spikes": multiple})
        shapes = jax.eval_shape(lambda c=config: init_state(jax.random.key(0), config=c))
        layout = make_layout(config, make_mesh(config.mesh)).state
        assert shapes.opt_state.keys() == layout.opt_state.keys() == parts
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or 1 / 0, shapes, layout)


@pytest.mark.parametrize(
    ("fields", "accumulate_steps", "mesh"),
    [
        ({}, 1, MeshConfig(data=1)),
        pytest.param({}, 2, MeshConfig(data=1), marks=pytest.mark.slow),
        pytest.param(FIELDS["gated"], 1, MeshConfig(data=1), marks=pytest.mark.slow),
        *(
            pytest.param({"param_dtype": "bfloat16"} | fields, *how, marks=pytest.mark.slow)
            for fields in ({}, FIELDS[PATTERN] | {"num_layers": 2})
            for how in [(1, MeshConfig(data=1)), (2, MeshConfig(data=2, fsdp=2, tensor=2))]
        ),
    ],
)
def test_compile_step_updates_all_of_the_state_in_place(
    train_config, said, fields, accumulate_steps, mesh
):
    config = train_config(model=SMALL | fields, accumulate_steps=accumulate_steps, mesh=mesh)
    program, layout = compiled(config)
    held = sum(
        np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(layout.state)
    )
    assert program.memory_analysis().alias_size_in_bytes == held
    assert "WARNING" not in " ".join(said)


def test_compile_step_says_if_the_state_is_held_twice(train_config, monkeypatch, said):
    jit = jax.jit

    def without_donation(*args, donate_argnums=(), **kwargs):
        return jit(*args, **kwargs)

    monkeypatch.setattr(jax, "jit", without_donation)
    compiled(train_config(model=SMALL))
    assert "WARNING: only 0 bytes of the state's" in said[-1]


@pytest.mark.slow
def test_compile_step_returns_what_the_compiler_has_freed(train_config, monkeypatch):
    calls = []
    monkeypatch.setattr("inl_jax.training.step.return_freed_memory", lambda: calls.append(1))
    compiled(train_config(model=SMALL))
    assert calls


@pytest.mark.slow  # by default test_language_model.py, of the loss and its gradient
@pytest.mark.parametrize("mixer", FIELDS)
def test_trace_step_does_not_grow_with_layers_or_iterations(train_config, mixer):
    def size(**fields):
        config = train_config(model=FIELDS[mixer] | {"remat": "block"} | fields)
        return len(traced(config).lower().as_text())

    small = size(num_layers=2, num_iterations=2)
    assert size(num_layers=6, num_iterations=2) == pytest.approx(small, rel=0.01)
    assert size(num_layers=2, num_iterations=9) == pytest.approx(small, rel=0.01)


@pytest.mark.parametrize(("mixer", "remat"), [(PATTERN, "none"), ("attention", "block")])
def test_trace_step_for_cuda_runs_attention_forward_and_backward_in_cudnn(
    train_config, monkeypatch, mixer, remat
):
    """Lowered for CUDA on any machine: what the compiler is given, not what it makes of it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)

    def program(**fields):
        fields |= FIELDS[mixer] | {"compute_dtype": "bfloat16", "remat": remat}
        config = train_config(model=fields)
        with made_for(H100):
            return traced(config).lower(lowering_platforms=("cuda",)).as_text()

    check_fused_attention(program())
    with pytest.raises(RuntimeError, match="in its forward and backward pass .found: none"):
        check_fused_attention(program(attention_kernel="xla"))


def test_check_fused_attention_names_the_missing_direction():
    forward = 'custom_call_target="__cudnn$fmhaSoftmax"'
    backward = 'custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    check_fused_attention(f"{forward}, x\n{backward}, y")
    with pytest.raises(RuntimeError, match=r"in its backward pass \(found: __cudnn\$fmhaSoftmax\)"):
        check_fused_attention(forward)
    with pytest.raises(RuntimeError, match="in its forward pass .*model.attention_kernel"):
        check_fused_attention(backward)


def test_compile_step_looks_for_the_kernel_that_was_asked_for(train_config, monkeypatch):
    # The step's checks alone: the model itself uses XLA's.
    monkeypatch.setattr("inl_jax.training.step.attention_kernel", lambda _: "cudnn")
    config = train_config(model=SMALL | {"context": "attention"})
    with pytest.raises(RuntimeError, match="lacks cuDNN"):
        compiled(config)


def test_train_step_compiles_once_for_any_length_of_run_and_learning_rate(train_config):
    """The learning rate is data: another num_steps compiles nothing."""
    config, longer = (train_config(model=SMALL, num_steps=n) for n in (8, 80))
    assert traced(config).lower().as_text() == traced(longer).lower().as_text()
    program, _ = compiled(config)
    rates = []
    for rate in (1e-2, 3e-3):
        state = init_state(jax.random.key(0), config=config)
        new, metrics = program(state, batches(1, seq=32)[0], np.float32(rate))
        rates.append(float(metrics["learning_rate"]))
        assert new.step == 1
    assert rates == [pytest.approx(1e-2), pytest.approx(3e-3)]
