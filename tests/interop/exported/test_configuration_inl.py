import pytest

from inl_jax.interop.exported_config import FUNCTION, to_json_fields

pytestmark = pytest.mark.slow


@pytest.fixture
def inl_config():
    pytest.importorskip("transformers")
    from inl_jax.interop.exported.configuration_inl import InlConfig

    return InlConfig


def test_config_keeps_our_fields_through_its_file(inl_config, model_config, tmp_path):
    given = {"kappa": float("inf"), "dropout": 0.1, "context": "gated", "attention_every": 2}
    fields = to_json_fields(model_config(**given))
    inl_config(**fields, eos_token_id=3).save_pretrained(tmp_path)
    read = inl_config.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in FUNCTION} == fields
    assert read.eos_token_id == 3


def test_config_has_the_standard_names(inl_config):
    config = inl_config(d_model=32, num_layers=3, d_ff=64, max_seq_len=9, num_heads=4)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 3, 64)
    assert (config.max_position_embeddings, config.num_attention_heads) == (9, 4)
    assert config.num_key_value_heads == 1
    assert inl_config(hidden_size=32).d_model == 32


@pytest.mark.parametrize("every", [0, 2, 4])
def test_contexts_of_the_layers_are_ours(inl_config, model_config, every):
    config = model_config(context="gated", attention_every=every, num_layers=8)
    ours = config.mixers * (config.num_layers // len(config.mixers))
    assert tuple(inl_config(**to_json_fields(config)).contexts) == ours


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"context": "rnn"}, "context='rnn'"),
        ({"d_model": 18, "num_heads": 4}, "d_model=18"),
        ({"d_model": 12, "num_heads": 4}, "d_model=12"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"context": "mean", "num_iterations": 0}, "num_iterations=0"),
        ({"context": "mean", "attention_every": 2}, "attention_every=2 with context='mean'"),
        ({"attention_every": 1}, "attention_every=1"),
        ({"attention_every": -2}, "attention_every=-2"),
        ({"attention_every": 3}, "attention_every=3: .*num_layers=4"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_impossible_config_is_named(inl_config, fields, named):
    with pytest.raises(ValueError, match=named):
        inl_config(**fields)
