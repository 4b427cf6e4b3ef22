import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError, MeshConfig, TrainConfig
from inl_jax.model.language_model import abstract_params, boxed_init
from inl_jax.parallel.sharding import (
    AXES,
    RULES,
    any_process,
    fit_to_mesh,
    local_rows,
    make_mesh,
    num_bytes,
    on,
    param_shardings,
    place,
    rows,
)
from inl_jax.training.state import make_layout
from inl_jax.training.step import compile_step, trace_step

MODEL = {"num_iterations": 2, "num_kv_heads": 2}


def make_state(layout):
    """Random weights, the same on every mesh, and an optimizer state of zeros."""
    rng = np.random.default_rng(0)

    def leaf(a):
        value = 0.3 * rng.normal(size=a.shape) if a.ndim else np.zeros(())
        return jax.device_put(value.astype(a.dtype), a.sharding)

    params = jax.tree.map(leaf, layout.state.params)
    rest = jax.tree.map(
        lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), layout.state
    )
    return rest._replace(params=params)


def one_update(config, mesh):
    """Loss, gradient norm and parameters after one update, run as `train` runs it."""
    config = fit_to_mesh(config, mesh)
    with on(mesh):
        layout = make_layout(config, mesh)
        step = compile_step(config, mesh, layout)
        batch = np.random.default_rng(1).integers(
            0, 300, (config.batch_size, config.data.seq_len + 1), np.int32
        )
        state, results = step(make_state(layout), place(mesh, batch), np.float32(1e-2))
    return state, results


@functools.cache
def on_one_device(config):
    return jax.device_get(one_update(config, mesh_of(1, 1, 1)))


def small_run(train_config, mixer="decay", accumulate_steps=1, batch_size=8):
    """A model with one layer of each mixer."""
    fields = FIELDS[mixer]
    # A large eps keeps rounding of gradients near 0 small.
    return train_config(
        model=MODEL | fields | {"num_layers": fields.get("attention_every", 1)},
        data={"seq_len": 8, "cache_dir": "c", "paths": ("p",)},
        optim={"eps": 1e-3},
        run_dir="r",
        accumulate_steps=accumulate_steps,
        batch_size=batch_size,
    )


def moments(state):
    """Adam's state somewhere in an optimizer's."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    (found,) = (leaf for leaf in leaves if isinstance(leaf, optax.ScaleByAdamState))
    return found


SHAPES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 2, 2)]
LEVELS = [
    (mixer, shape, shards, k)
    for mixer in FIELDS
    for shape in SHAPES
    for shards in ("all", "optimizer")
    for k in (1, 2)
    if shape[1] > 1 or shards == "all"
]
QUICK = [
    ("decay", (2, 2, 2), "optimizer", 2),
    ("gated", (1, 4, 2), "all", 1),
]


@pytest.mark.parametrize(
    ("mixer", "shape", "shards", "accumulate_steps"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in LEVELS],
)
def test_train_step_on_eight_devices_computes_what_one_does(
    train_config, mixer, shape, shards, accumulate_steps
):
    """Loss, gradients (by the first moment they leave) and parameters, on every kind of mesh."""
    rows = shape[0] * shape[1] * accumulate_steps
    config = small_run(
        train_config, mixer, accumulate_steps=accumulate_steps, batch_size=max(8, rows)
    )
    expected, expected_results = on_one_device(config)
    config = dataclasses.replace(
        config, mesh=MeshConfig(**dict(zip(AXES, shape, strict=True)), fsdp_shards=shards)
    )
    state, results = one_update(config, make_mesh(config.mesh))

    def compared(state, results):
        gradients = {part: moments(state.opt_state[part]).mu for part in ("blocks", "rest")}
        scalars = {name: results[name] for name in ("loss", "grad_norm")}
        return scalars | {"gradients": gradients, "parameters": state.params}

    def error(found, expected):
        return np.abs(found - expected).max() / np.abs(expected).max()

    errors = jax.tree.map(
        error, compared(*jax.device_get((state, results))), compared(expected, expected_results)
    )
    assert all(leaf <= 1e-5 for leaf in jax.tree.leaves(errors)), errors
    names = ("loss", "grad_norm", "gradients", "parameters")
    worst = (max(jax.tree.leaves(errors[name])) for name in names)
    print(
        f"\n| {mixer} | {' x '.join(map(str, shape))} | {shards} | {accumulate_steps} |",
        " | ".join(f"{size:.1e}" for size in worst),
        "|",
    )

    moment = moments(state.opt_state["rest"]).nu["embedding"]
    split = {"all": shape[1] * shape[2], "optimizer": shape[2]}[shards]
    assert state.params["embedding"].addressable_shards[0].data.nbytes * split == moment.nbytes
    assert moment.addressable_shards[0].data.nbytes * shape[1] * shape[2] == moment.nbytes


def test_fit_to_mesh_gives_the_step_micro_batches_with_a_row_for_every_device(train_config):
    """Eight micro-batches of one row each, of which four devices make two of four rows."""
    config, mesh = small_run(train_config, accumulate_steps=8), mesh_of(2, 2, 1)
    fitted = fit_to_mesh(config, mesh)
    with on(mesh):
        program = trace_step(fitted, mesh, make_layout(fitted, mesh)).lower().as_text()
        with pytest.raises(AssertionError, match="not fitted"):
            trace_step(config, mesh, make_layout(config, mesh))
    assert "tensor<2x4x9xi32>" in program and "tensor<8x1x9xi32>" not in program


@pytest.mark.slow
def test_train_step_of_a_config_for_one_device_computes_the_same_on_many(train_config):
    config = small_run(train_config, "mean", accumulate_steps=8)
    expected, expected_results = on_one_device(config)
    state, results = one_update(config, mesh_of(2, 2, 1))
    np.testing.assert_allclose(results["loss"], expected_results["loss"], rtol=1e-5)
    found, expected = jax.device_get(state.params), expected.params
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(leaf - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("mixer", ["decay", pytest.param(PATTERN, marks=pytest.mark.slow)])
def test_train_step_moves_every_parameter(train_config, mixer):
    """Without this the comparison above would show nothing."""
    config = small_run(train_config, mixer, accumulate_steps=2)
    mesh = mesh_of(1, 1, 1)
    start = make_state(make_layout(config, mesh)).params
    end, _ = on_one_device(config)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), start, end.params)))


@pytest.mark.parametrize("mixer", FIELDS)
def test_make_layout_shards_parameters_and_state_over_fsdp_and_tensor(train_config, mixer):
    config = train_config(model=FIELDS[mixer] | {"param_dtype": "bfloat16", "num_kv_heads": 2})

    def bytes_per_device(*shape):
        return num_bytes(make_layout(config, mesh_of(*shape)).state)

    whole = bytes_per_device(1, 1, 1)
    assert bytes_per_device(8, 1, 1) == whole
    # Norms, biases and scalars stay whole; at this width they are some percent.
    assert bytes_per_device(1, 8, 1) < 0.25 * whole
    assert bytes_per_device(1, 1, 2) < 0.65 * whole
    assert bytes_per_device(1, 4, 2) < 0.25 * whole


@pytest.mark.parametrize("mixer", FIELDS)
def test_rules_cover_every_axis_of_every_parameter(model_config, mixer):
    boxed = jax.eval_shape(
        functools.partial(boxed_init, model_config(**FIELDS[mixer])), jax.random.key(0)
    )
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    names = {name for box in boxes for name in box.names}
    assert names - {None} <= {name for name, _ in RULES}
    assert all(len(box.names) == box.value.ndim for box in boxes)


def test_make_mesh_fills_the_devices_or_says_why_not(monkeypatch):
    assert tuple(make_mesh(MeshConfig()).shape.values()) == (8, 1, 1)
    assert tuple(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape.values()) == (2, 2, 2)
    assert tuple(make_mesh(MeshConfig(data=2, fsdp="rest")).shape.values()) == (2, 4, 1)
    assert tuple(make_mesh(MeshConfig(data=1, tensor="rest")).shape.values()) == (1, 1, 8)
    assert make_mesh(MeshConfig(data=2, fsdp=2)).devices.ravel().tolist() == jax.devices()[:4]
    for wrong in (MeshConfig(fsdp=3), MeshConfig(fsdp=16), MeshConfig(data=16)):
        fields = f"mesh.data={wrong.data}, mesh.fsdp={wrong.fsdp}.* there are 8; --mesh"
        with pytest.raises(InputError, match=fields):
            make_mesh(wrong)
    alone = SimpleNamespace(process_index=0, platform="cpu")
    monkeypatch.setattr(jax, "devices", lambda: [alone])
    with pytest.raises(InputError, match="there are 1; JAX_NUM_CPU_DEVICES=8 makes eight"):
        make_mesh(MeshConfig(fsdp=8))


def test_make_mesh_names_processes_with_unequal_numbers_of_devices():
    devices = [SimpleNamespace(process_index=i, platform="cpu") for i in (0, 1, 1)]
    with pytest.raises(InputError, match="process 0 has 1 devices and process 1 has 2"):
        make_mesh(MeshConfig(), devices=devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": "rest", "fsdp": "rest"}, "mesh.data and mesh.fsdp are both rest"),
        ({"fsdp": 0}, "mesh.fsdp=0: a positive whole number up to 1,000,000, or rest"),
        ({"tensor": 1.5}, "mesh.tensor=1.5: must be of type int"),
        ({"data": "all"}, "mesh.data='all': must be of type int, or rest"),
    ],
)
def test_mesh_config_names_a_wrong_size_of_an_axis(sizes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


def test_param_shardings_names_a_parameter_without_a_rule(model_config, monkeypatch):
    from inl_jax.parallel import sharding

    monkeypatch.setattr(sharding, "RULES", tuple(r for r in RULES if r[0] != "mlp"))
    with pytest.raises(InputError, match="blocks/.*_kernel has the axis 'mlp', which RULES lacks"):
        param_shardings(mesh_of(1, 1, 1), model_config())


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_fit_to_mesh_gives_each_device_a_row_and_no_more_than_one_alone_would_have(a, b, c):
    """Any batch, in any micro-batches it divides into, on any devices it divides over."""
    config = TrainConfig(batch_size=a * b * c, accumulate_steps=a * b)
    for devices in (a * c, b * c, a, b * b):
        mesh = SimpleNamespace(shape={"data": devices, "fsdp": 1, "tensor": 1})
        if config.batch_size % devices:
            with pytest.raises(InputError, match=f"batch_size={a * b * c}: must be a multiple"):
                fit_to_mesh(config, mesh)
            continue
        rows, left = divmod(config.batch_size, fit_to_mesh(config, mesh).accumulate_steps * devices)
        assert left == 0 and 1 <= rows <= config.batch_size // config.accumulate_steps


def test_fit_to_mesh_keeps_micro_batches_that_give_every_device_a_row(train_config):
    mesh = mesh_of(2, 2, 2)  # rows are split over data and fsdp
    for steps, spread in ((1, 1), (2, 2), (4, 2), (8, 2)):
        config = train_config(batch_size=8, accumulate_steps=steps)
        assert fit_to_mesh(config, mesh).accumulate_steps == spread


@pytest.mark.parametrize(
    "mesh, change, named",
    [
        ((1, 1, 8), {"d_model": 20}, r"model.d_model=20: .* 8 devices \(mesh.tensor; .*bias"),
        ((1, 8, 1), {"d_model": 20}, r"model.d_model=20: .* 8 devices \(mesh.fsdp; .*kernel"),
        ((1, 4, 2), {"d_model": 20}, r"model.d_model=20: .* 8 devices \(mesh.\w+ x mesh.\w+; "),
        ((1, 1, 4), {"d_ff": 30}, r"model.d_ff=30: .* 4 devices \(mesh.tensor; .*down_"),
        ((1, 1, 2), {"context": "attention", "num_kv_heads": 1}, "model.num_kv_heads=1: .*key_k"),
        ((1, 1, 2), FIELDS[PATTERN], "model.num_kv_heads=1: .*layer_1/context/key_k"),
        (
            (1, 1, 4),
            {"context": "attention", "num_kv_heads": 2},
            "model.num_(kv_)?heads=2: .*kernel",
        ),
    ],
)
def test_param_shardings_names_a_dimension_that_does_not_divide(model_config, mesh, change, named):
    with pytest.raises(InputError, match=named):
        param_shardings(mesh_of(*mesh), model_config(**change))


def test_place_puts_rows_in_order():
    mesh = mesh_of(2, 2, 2)
    batch = np.arange(24, dtype=np.int32).reshape(8, 3)
    assert local_rows(mesh, 8) == slice(0, 8)
    placed = place(mesh, batch)
    np.testing.assert_array_equal(placed, batch)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    assert placed.dtype == jnp.int32


@pytest.mark.parametrize(
    ("shape", "reads"),
    [
        ((8, 1, 1), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ((2, 2, 2), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ((2, 1, 4), [(0, 4), (0, 4), (4, 8), (4, 8)]),  # the tensor axis crosses processes
        ((1, 1, 8), [(0, 8)] * 4),
    ],
)
def test_local_rows_are_those_of_the_devices_of_a_process(monkeypatch, shape, reads):
    """As if every two of the eight devices were of one process."""
    mesh = mesh_of(*shape)
    batch = np.arange(24, dtype=np.int32).reshape(8, 3)
    devices = mesh.devices.ravel().tolist()
    everywhere = jax.sharding.NamedSharding.addressable_devices_indices_map
    for process, read in enumerate(reads):
        own = devices[2 * process : 2 * process + 2]
        monkeypatch.setattr(
            jax.sharding.NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, own=own: {
                d: index for d, index in everywhere(self, shape).items() if d in own
            },
        )
        assert local_rows(mesh, 8) == slice(*read)
        parts = {}

        def only_own(shape, sharding, part, own=own, parts=parts):
            parts |= {d: part(sharding.devices_indices_map(shape)[d]) for d in own}
            assert shape == (8, 3)

        with monkeypatch.context() as patch:
            patch.setattr(jax, "make_array_from_callback", only_own)
            place(mesh, batch[local_rows(mesh, 8)])
        for d, index in rows(mesh).devices_indices_map((8, 3)).items():
            if d in own:
                np.testing.assert_array_equal(parts[d], batch[index])


def test_any_process_tells_the_vote_of_the_previous_call(monkeypatch):
    mesh = mesh_of(2, 2, 2)
    assert [any_process(mesh)(flag) for flag in (False, True)] == [False, True]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ask = any_process(mesh)
    assert [ask(flag) for flag in (False, True, False, False)] == [False, False, True, False]


def test_shardings_match_the_parameters_in_structure(model_config):
    for fields in FIELDS.values():
        config = model_config(**fields)
        shardings = param_shardings(mesh_of(1, 4, 1), config)
        assert jax.tree.structure(shardings) == jax.tree.structure(abstract_params(config))


def test_on_keeps_rows_whole_if_asked():
    mesh = mesh_of(2, 2, 2)

    def rows_of_a_batch(**settings):
        with on(mesh, **settings):
            return nn.logical_to_mesh_axes(("batch", "embed", "mlp"))

    assert rows_of_a_batch()[0] == ("data", "fsdp")
    assert tuple(rows_of_a_batch(split_rows=False)) == (None, "fsdp", "tensor")
    with on(None):
        assert jax.sharding.get_abstract_mesh().empty
