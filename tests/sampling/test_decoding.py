import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import lively_params
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError
from inl_jax.model import language_model as model
from inl_jax.model.platform.device import H100, made_for
from inl_jax.planning.programs.xla import compile_for_cuda
from inl_jax.sampling import decoding, generate
from inl_jax.sampling.decoding import decode_loop, prefill, read_first, read_on, start_rows

MODELS = [
    *[("mean", 3), ("decay", 3), ("attention", 1), (PATTERN, 0)],
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in [
            ("decay", 0),
            *itertools.product(["gated", "attention"], (0, 3)),
            (PATTERN, 3),
        ]
    ),
]


WITH_CACHE = ["attention", pytest.param(PATTERN, marks=pytest.mark.slow)]


PROMPTS = [[5, 9, 200, 31], [7], [250, 3, 3, 17, 90, 41, 8, 1, 64]]


SAMPLING = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50, "top_p": 0.95}


forward = jax.jit(model.apply, static_argnums=0)


decode = jax.jit(model.decode, static_argnums=0)


@pytest.fixture(params=MODELS, ids=lambda case: f"{case[0]}-T{case[1]}")
def language_model(request, model_config):
    mixer, num_iterations = request.param
    config = model_config(**FIELDS[mixer], num_iterations=num_iterations)
    return config, lively_params(config)


@pytest.fixture
def decay_model(model_config):
    config = model_config(context="decay", num_iterations=1)
    return config, lively_params(config)


def test_generate_greedy_takes_the_argmax_of_the_full_forward_pass(language_model):
    """For prompts of several lengths in one batch."""
    config, params = language_model
    produced = generate(config, params, PROMPTS, max_new_tokens=8)
    ids = np.zeros((3, config.max_seq_len), np.int32)
    for row, prompt, new in zip(ids, PROMPTS, produced, strict=True):
        row[: len(prompt) + 8] = [*prompt, *new]
    assert len(np.unique(produced)) > 4  # not one token over and over
    best = np.argmax(forward(config, params, ids), axis=-1)
    for row, prompt, new in zip(best, PROMPTS, produced, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 7].tolist() == new.tolist()


def test_incremental_logits_equal_full_logits(language_model):
    config, params = language_model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 12), np.int32)
    full = forward(config, params, np.pad(ids, ((0, 0), (0, 20))))

    state = model.init_decode_state(config, 3, max_len=12)
    for i in range(12):
        logits, state = decode(config, params, state, ids[:, i : i + 1])
        np.testing.assert_allclose(logits, full[:, i], rtol=1e-5, atol=1e-5)

    # Rows advance by different lengths; the padding of the last chunks reaches beyond max_len.
    state = model.init_decode_state(config, 3, max_len=12)
    at = np.zeros(3, int)
    for lengths in [(4, 1, 3), (1, 3, 1), (2, 4, 4), (4, 2, 3), (1, 2, 1)]:
        chunk = np.full((3, 4), 299, np.int32)
        for row, n in enumerate(lengths):
            chunk[row, :n] = ids[row, at[row] : at[row] + n]
        logits, state = decode(config, params, state, chunk, np.array(lengths))
        at += lengths
        np.testing.assert_array_equal(state.position_B, at)
        np.testing.assert_allclose(logits, full[np.arange(3), at - 1], rtol=1e-5, atol=1e-5)
    assert at.tolist() == [12, 12, 12]


def test_generate_samples_a_row_whatever_its_neighbours(decay_model):
    alone = generate(*decay_model, PROMPTS[2:], **SAMPLING)[0]
    together = generate(*decay_model, [PROMPTS[2], [1], [2, 3, 4, 5]], **SAMPLING)[0]
    assert together.tolist() == alone.tolist()


def test_generate_stops_a_row_at_its_end_token_and_leaves_it_out(decay_model):
    free = [row.tolist() for row in generate(*decay_model, PROMPTS, max_new_tokens=8)]
    end_id = next(token for token in free[0][2:] if token not in free[1])
    produced = generate(*decay_model, PROMPTS, max_new_tokens=8, end_id=end_id)
    for row, new in zip(free, produced, strict=True):
        assert new.tolist() == (row[: row.index(end_id)] if end_id in row else row)
    assert len(produced[0]) < 8 == len(produced[1])


def test_generate_draws_by_the_seed(decay_model):
    def sample(seed, prompts=PROMPTS):
        return [
            row.tolist() for row in generate(*decay_model, prompts, **SAMPLING | {"seed": seed})
        ]

    assert sample(1) == sample(1) != sample(2)
    first, second, third = sample(1, [[5]] * 3)
    assert first != second != third


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_choose_at_its_narrowest_is_greedy(decay_model, narrow):
    greedy = generate(*decay_model, PROMPTS, max_new_tokens=8)
    narrowed = generate(*decay_model, PROMPTS, **SAMPLING | narrow)
    np.testing.assert_array_equal(greedy, narrowed)


def test_decode_state_grows_in_layers_of_attention_alone(model_config):
    def shapes(mixer, max_len, **fields):
        config = model_config(**FIELDS[mixer], **fields, max_seq_len=4096)
        return jax.eval_shape(functools.partial(model.init_decode_state, config, 3, max_len)).layers

    def size(layers):
        return sum(leaf.size for leaf in jax.tree.leaves(layers))

    for mixer in ("mean", "decay", "gated"):
        assert shapes(mixer, 16) == shapes(mixer, 4096)
    assert size(shapes("attention", 16)) == size(shapes("attention", 4096)) / 256
    pattern = shapes(PATTERN, 16, num_layers=6)
    assert pattern["layer_0"] == shapes("gated", 16, num_layers=3)
    assert pattern["layer_1"] == shapes("attention", 16, num_layers=3)


def test_generate_compiles_once_for_equal_shapes(decay_model):
    def sizes():
        return read_first._cache_size(), decode_loop._cache_size()

    generate(*decay_model, PROMPTS, **SAMPLING)
    before = sizes()
    for i in range(1, 4):  # other prompt lengths, seeds, temperatures, end tokens
        other = {"temperature": 0.5 * i, "top_p": 0.2 * i, "seed": i, "end_id": i}
        generate(*decay_model, [[1] * i, [2], [3] * 20], **SAMPLING | other)
    assert sizes() == before


def test_generate_may_fill_the_model_to_its_last_position(decay_model):
    rows = generate(*decay_model, [[1] * 24, *PROMPTS[:2]], max_new_tokens=8)
    assert [len(row) for row in rows] == [8, 8, 8]
    np.testing.assert_array_equal(rows[1:], generate(*decay_model, PROMPTS, max_new_tokens=8)[:2])


@pytest.mark.parametrize(
    "change, named",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "no tokens"),
        ({"prompts": [[1, 300]]}, "token id 300"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2**31}, "max_new_tokens=2147483648: must be from 1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 10**9}, "num_samples=1000000000: .* at most 65,536 texts"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_generate_names_mistakes(decay_model, change, named):
    arguments = {"prompts": [[1]], "max_new_tokens": 4} | change
    with pytest.raises(InputError, match=named):
        generate(*decay_model, **arguments)


@pytest.mark.parametrize("mixer", ["attention", PATTERN])
def test_generate_names_a_sequence_that_the_cache_of_attention_cannot_hold(model_config, mixer):
    config = model_config(**FIELDS[mixer])
    with pytest.raises(InputError, match="a prompt of 30 tokens .* model.max_seq_len=32: lower"):
        generate(config, None, [[1] * 30], max_new_tokens=4)


@pytest.mark.parametrize(
    "context", ["mean", "decay", pytest.param("gated", marks=pytest.mark.slow)]
)
def test_generate_goes_beyond_the_longest_trained_sequence(
    model_config, context, said, monkeypatch
):
    """As the full forward pass of the longer sequence does, and with one line that says so."""
    monkeypatch.setattr(decoding, "PROMPT_PIECE", 32)  # two pieces and a part of one
    config = model_config(context=context, num_iterations=1)
    params = lively_params(config)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, 70).tolist()
    (new,) = generate(config, params, [prompt], max_new_tokens=8)
    ids = np.array([[*prompt, *new]])
    best = np.argmax(forward(config, params, ids), axis=-1)[0]
    assert best[69:77].tolist() == new.tolist()
    assert [line for line in said if "max_seq_len=32: the model was not trained" in line] == said
    assert len(said) == 1


def test_prefill_in_pieces_leaves_the_state_of_one_pass(language_model, monkeypatch):
    """For rows that end in the first, a later and the last piece."""
    config, params = language_model
    lengths = np.array([3, 9, 26])
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 26))
    whole = prefill(config, params, ids, lengths, max_len=32)
    monkeypatch.setattr(decoding, "PROMPT_PIECE", 8)
    monkeypatch.setattr(decoding, "SHORTEST_PIECE", 8)
    logits, state = prefill(config, params, ids, lengths, max_len=32)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    same(logits, whole[0])
    np.testing.assert_array_equal(state.position_B, lengths)
    for leaf, other in zip(
        jax.tree.leaves(state.layers), jax.tree.leaves(whole[1].layers), strict=True
    ):
        for b, length in enumerate(lengths):
            # [L, G, N, K] of attention, [L, D] of the others
            read = np.s_[:, :, :length] if leaf.ndim == 5 else np.s_[:]
            same(leaf[:, b][read], other[:, b][read])


def test_generate_draws_samples_of_a_prompt_that_depend_on_nothing_else(decay_model):
    several = generate(*decay_model, PROMPTS, num_samples=3, **SAMPLING)
    assert len({tuple(row) for row in several}) == 9
    fewer = generate(*decay_model, PROMPTS[:2], num_samples=2, **SAMPLING)
    assert [row.tolist() for row in fewer] == [several[i].tolist() for i in (0, 1, 3, 4)]


def test_generate_with_a_repetition_penalty_repeats_nothing_it_need_not(decay_model):
    """Greedily, against the logits of the full forward pass with the penalty written out."""
    config, params = decay_model
    prompt = [5, 9, 200]
    (new,) = generate(config, params, [prompt], max_new_tokens=8, repetition_penalty=3.0)
    ids = np.zeros((3, config.max_seq_len), np.int32)
    ids[0, :11] = row = [*prompt, *new]
    logits = np.array(forward(config, params, ids)[0])
    for i in range(3, 11):
        now, seen = logits[i - 1], list(set(row[:i]))
        now[seen] = np.where(now[seen] < 0, now[seen] * 3, now[seen] / 3)
        assert np.argmax(now) == row[i]
    (free,) = generate(config, params, [prompt], max_new_tokens=8)
    assert free.tolist() != new.tolist()


def begun(config, *, batch_size=3, max_len=12):
    """Rows that have read nothing yet."""
    state = model.init_decode_state(config, batch_size, max_len)
    logits = jnp.zeros((batch_size, config.vocab_size))
    return start_rows(logits, state, None, np.uint32(0), 0, 1)


def test_decode_loop_reads_no_token_that_nothing_follows(decay_model):
    """Neither the last of all nor one after which every row has ended."""

    def read(size, limit, end_id):
        settings = {"size": size, "top_k": 0, "num_ids": 300}
        *_, rows = decode_loop(
            *decay_model, begun(decay_model[0]), {}, end_id, 0, limit, **settings
        )
        return rows.state.position_B.tolist()

    assert read(4, 9, -1) == [4] * 3  # the next piece goes on from there
    assert read(4, 4, -1) == [3] * 3
    assert read(4, 9, 0) == [0] * 3  # the likeliest of equal logits is token 0, the end


def cache_operations(text, config, batch_size, max_len):
    """What a compiled program makes as large as the cache, by name of the operation."""
    layers = jax.tree.leaves(model.init_decode_state(config, batch_size, max_len).layers)
    shape = max((leaf.shape for leaf in layers), key=math.prod)
    arrays = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return {
        name for dims, name in arrays if math.prod(map(int, dims.split(","))) == math.prod(shape)
    }


IN_PLACE = {"scatter", "fusion", "parameter", "get-tuple-element", "bitcast"}
"""A fusion's own operations are listed too."""


def traced_loop(config):
    rows = jax.eval_shape(functools.partial(begun, config, batch_size=5, max_len=331))
    settings = {"size": 8, "top_k": 0, "num_ids": config.vocab_size}
    return decode_loop.trace(config, model.abstract_params(config), rows, {}, 0, 0, 8, **settings)


@pytest.mark.parametrize("mixer", WITH_CACHE)
def test_decode_loop_never_copies_the_cache_of_attention(model_config, mixer):
    # Four layers: XLA makes no loop of a single group, and copies its cache.
    config = model_config(**FIELDS[mixer], num_layers=4, num_iterations=0, max_seq_len=512)
    text = traced_loop(config).lower().compile().as_text()
    assert "scatter" in cache_operations(text, config, 5, 331) <= IN_PLACE


@pytest.mark.slow
@pytest.mark.parametrize("mixer", WITH_CACHE)
def test_decode_loop_for_a_gpu_never_copies_the_cache_of_attention(model_config, mixer):
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs XLA's CUDA compiler")
    config = model_config(**FIELDS[mixer], d_model=128, max_seq_len=512, compute_dtype="bfloat16")
    with made_for(H100):
        text = compile_for_cuda(traced_loop(config), 1).text
    assert "scatter" in cache_operations(text, config, 5, 331) <= IN_PLACE


@pytest.mark.slow
@pytest.mark.parametrize("mixer", WITH_CACHE)
def test_reading_on_never_copies_the_cache_of_attention(model_config, mixer):
    config = model_config(**FIELDS[mixer], num_layers=4, max_seq_len=512)
    rows = jax.eval_shape(functools.partial(begun, config, batch_size=5, max_len=331))
    piece = np.zeros((5, 32), np.int32), np.zeros(5, np.int32)
    params = model.abstract_params(config)
    text = read_on.lower(config, params, rows.logits_BV, rows.state, *piece).compile().as_text()
    assert "scatter" in cache_operations(text, config, 5, 331) <= IN_PLACE
