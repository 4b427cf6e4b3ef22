import math

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import MeshConfig
from inl_jax.model.language_model import abstract_params
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning.programs.collectives import find_collectives, least_bytes, summed
from inl_jax.planning.programs.xla import compile_abstractly
from inl_jax.training.state import make_layout


def test_find_collectives_counts_each_with_its_loop():
    mesh = mesh_of(2, 2, 2)

    def program(x):  # [4, 6] of float32 on each device
        def body(carry, _):
            whole = jax.lax.all_gather(carry, "fsdp", axis=1, tiled=True)
            return carry + jax.lax.psum_scatter(whole, "fsdp", scatter_dimension=1, tiled=True), ()

        x, _ = jax.lax.scan(body, x, length=5)
        swapped = jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True)
        shifted = jax.lax.ppermute(swapped, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(shifted, ("data", "fsdp"))

    sharded = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=P("data", ("fsdp", "tensor")),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct(
        (8, 24), jnp.float32, sharding=NamedSharding(mesh, P("data", ("fsdp", "tensor")))
    )
    found = find_collectives(jax.jit(sharded).lower(x).compile().as_text(), mesh)
    part = 4 * 6 * 4  # bytes
    assert summed(found) == {
        ("all-gather", "fsdp"): (5, 5 * part),
        ("reduce-scatter", "fsdp"): (5, 5 * part),
        ("all-reduce", "data+fsdp"): (1, 2 * part * 3 // 4),
        ("all-to-all", "tensor"): (1, part // 2),
        ("collective-permute", "data"): (1, part),
    }
    (gather,) = (c for c in found if c.kind == "all-gather")
    assert gather.arrays == ((4, 12),) and "all_gather" in gather.origin


CUDA = """
HloModule step, entry_computation_layout={(bf16[8,4]{1,0})->bf16[8,4]{1,0}}

%scatter (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=GROUPS, dimensions={0}
}

%body (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  %w = bf16[8,4]{1,0} get-tuple-element(%c), index=1
  %v = f32[3]{0} constant({1, 2, 3})
  %s = ((bf16[8,4]{1,0}, f32[3]{0}), (bf16[32,4]{1,0}, f32[12]{0})) all-gather-start(%w, %v), replica_groups=GROUPS, dimensions={0}
  %d = (bf16[32,4]{1,0}, f32[12]{0}) all-gather-done(%s)
  %r = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) async-start(%w), calls=%scatter
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%w, %w)
}

%cond (c: (s32[], bf16[8,4])) -> pred[] {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = (s32[], bf16[8,4]{1,0}) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %o = bf16[8,4]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,2,4,6},{1,3,5,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['a'=4,'b'=2] {'a'}",
        "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
    ],
)
def test_find_collectives_reads_the_text_of_the_cuda_compiler(groups):
    """Collectives that start and end in two places, are wrapped, or hold several arrays."""
    found = summed(find_collectives(CUDA.replace("GROUPS", groups), mesh_of(2, 2, 2)))
    assert found == {
        ("all-gather", "data+fsdp"): (7, 7 * 3 * (8 * 4 * 2 + 3 * 4)),
        ("reduce-scatter", "data+fsdp"): (7, 7 * 3 * 8 * 4 * 2 // 4),
    }


SLOW = pytest.mark.slow
ONE_QUICK = [name if name == "decay" else pytest.param(name, marks=SLOW) for name in FIELDS]
LAYERS, ITERATIONS, MICRO, ROWS, SEQ, WIDTH, VOCAB = 4, 6, 2, 16, 24, 40, 302


@pytest.fixture
def step_of(train_config):
    """Compiles a training step on a mesh: `step_of(1, 8, 1)` gives collectives, config, mesh."""

    def compiled(*shape, mixer="decay", **mesh):
        config = train_config(
            model=FIELDS[mixer]
            | {
                "num_layers": LAYERS,
                "num_iterations": ITERATIONS,
                "d_model": WIDTH,
                "d_ff": 56,
                "vocab_size": VOCAB,
                "remat": "block",
                "num_heads": 2,
                "num_kv_heads": 2,
            },
            data={"seq_len": SEQ},
            batch_size=ROWS,
            accumulate_steps=MICRO,
            loss_chunk=8,
            mesh=MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2], **mesh),
        )
        mesh = make_mesh(config.mesh)
        program = compile_abstractly(config, mesh, make_layout(config, mesh), "cpu")
        return find_collectives(program.text, mesh), config, mesh

    return compiled


def squeezed(shape):
    return tuple(sorted(n for n in shape if n != 1))


def kept_shapes(config):
    """Shapes of one layer's parameters and of the embedding."""
    params = abstract_params(config.model)
    layers = [leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"])]
    return {squeezed(shape) for shape in [*layers, params["embedding"].shape]}


def check_no_logits(found, tensor=1):
    """Asserts that arrays with a vocabulary dimension are parts of the embedding, not logits."""
    for c in found:
        for shape in c.arrays:
            if VOCAB in shape or -(-VOCAB // tensor) in shape:
                assert math.prod(shape) <= VOCAB * WIDTH and WIDTH % min(shape) == 0, c


@pytest.mark.parametrize("mixer", ONE_QUICK)
def test_fsdp_gathers_only_parameters_and_once_for_each_pass(step_of, mixer):
    found, config, mesh = step_of(1, 8, 1, mixer=mixer)
    check_no_logits(found)
    gathers = [c for c in found if c.kind == "all-gather"]
    ids = (ROWS // MICRO, SEQ)
    for c in gathers:
        assert all(
            squeezed(shape) in kept_shapes(config) or squeezed(shape) == squeezed(ids)
            for shape in c.arrays
        ), c
        assert c.times <= LAYERS * MICRO, c  # not in an inner loop
    # Blocks are gathered for the forward pass and, because of remat, for the backward pass. The
    # embedding is gathered once.
    sent = sum(c.sent_bytes for c in gathers)
    gathered = least_bytes(config, mesh) / 2
    assert gathered < sent < 2 * gathered
    # The other collectives carry gradients and the embeddings of tokens.
    for c in found:
        if c.kind == "all-to-all":
            assert c.times == MICRO and c.axes == ("fsdp",), c
        elif c.kind != "all-gather":
            assert c.kind in ("all-reduce", "reduce-scatter") and c.times <= LAYERS * MICRO, c


@SLOW
def test_replicas_exchange_only_gradients(step_of):
    found, config, mesh = step_of(8, 1, 1)
    check_no_logits(found)
    assert {c.kind for c in found} <= {"all-reduce", "reduce-scatter"}
    assert max(c.times for c in found) <= LAYERS * MICRO
    # The embedding counts twice: its gradients from the look-up and from the logits are separate.
    assert sum(c.sent_bytes for c in found) < 1.5 * least_bytes(config, mesh)


@SLOW
def test_sharded_optimizer_state_gathers_the_new_parameters_once(step_of):
    found, config, _ = step_of(1, 8, 1, fsdp_shards="optimizer")
    check_no_logits(found)
    params = abstract_params(config.model)
    sizes = [math.prod(a.shape) for a in [*jax.tree.leaves(params), params["embedding"]]]
    assert sum(c.sent_bytes for c in found if c.kind == "all-gather") < 4 * sum(sizes)
    assert max(c.times for c in found if c.kind == "all-gather") <= MICRO


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FIELDS)
def test_tensor_axis_exchanges_hidden_units_in_the_loop_and_the_stream_outside(step_of, mixer):
    found, config, _ = step_of(2, 2, 2, mixer=mixer)
    check_no_logits(found, tensor=2)
    tokens = ROWS // MICRO // 4 * SEQ  # of a micro-batch on a device
    hidden = 4 * config.model.controller_width
    assert hidden < WIDTH
    for c in found:
        if c.times > LAYERS * MICRO:  # in a loop within a layer, or over chunks of the loss
            assert c.axes == ("tensor",), c
        if "integrator" in c.origin and "closed_call/while" in c.origin.split("integrator")[-1]:
            assert sum(map(math.prod, c.arrays)) <= tokens * (hidden + 1), c
        # Over fsdp and data only parameters, gradients and embeddings of tokens are exchanged.
        if c.kind == "all-gather" and c.axes != ("tensor",):
            assert max(map(math.prod, c.arrays)) <= VOCAB * WIDTH, c
    streams = sum(
        c.times
        for c in found
        for shape in c.arrays
        if c.kind == "all-gather" and "blocks" in c.origin and math.prod(shape) == tokens * WIDTH
    )
    # The stream is gathered after the integrator (forward, recomputed, gradient by n), after the
    # decay context (forward, recomputed), and after the gated context and attention, whose outputs
    # are summed over the axis (forward, recomputed, gradient).
    each = {"mean": 3, "decay": 5, "gated": 6, "attention": 6, PATTERN: 6}[mixer]
    assert streams == each * LAYERS * MICRO
