import numpy as np
import pytest
from conftest import MODEL
from hypothesis import given
from hypothesis import strategies as st
from lively import lively_params

from inl_jax.config import InputError, ModelConfig
from inl_jax.sampling import LanguageModel, Sampling, decoding, generate
from inl_jax.tokens.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # lm_eval takes seconds to import


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def adapter():
    pytest.importorskip("lm_eval")
    from inl_jax.harness.adapter import RunLM

    config = ModelConfig(**MODEL)
    model = LanguageModel(config, lively_params(config), load_tokenizer("bytes"))
    return RunLM(model, batch_size=4)


def test_an_empty_context_is_the_end_token(adapter):
    (empty,), (after_end,) = (
        adapter.loglikelihood([Request("", "abc")]),
        adapter.scorer.score([([adapter.eot_token_id], list(b"abc"))]),
    )
    assert empty == tuple(after_end)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(adapter):
    one, other = adapter.loglikelihood([Request("a b ", "cd"), Request("a b", " cd")])
    assert one == pytest.approx(other)


def test_a_text_is_scored_in_windows_that_predict_every_token_once(adapter):
    text = bytes(range(40, 110)).decode()
    ids, end, length = list(text.encode()), adapter.eot_token_id, adapter.max_length
    windows = [
        ([end], ids[:32]),
        (ids[31:32], ids[32:64]),
        (ids[69 - length : 64], ids[64:]),  # the last one sees a whole window
    ]
    total = sum(score.log_likelihood for score in adapter.scorer.score(windows))
    assert adapter.loglikelihood_rolling([Request(text), Request("")]) == pytest.approx([total, 0])


def test_generation_ends_before_the_first_stop_string(adapter):
    model = adapter._model
    prompts = ["ab", "a longer prompt"]
    whole = [
        model.tokenizer.decode(row)
        for row in generate(
            model.config,
            model.params,
            [list(p.encode()) for p in prompts],
            max_new_tokens=12,
            end_id=model.tokenizer.end_id,
            num_ids=model.tokenizer.vocab_size,
        )
    ]
    settings = {"max_gen_toks": 12, "until": [whole[0][5:7], whole[0][3]]}
    found = adapter.generate_until([Request(prompt, settings) for prompt in prompts])
    assert found[0] == whole[0].partition(whole[0][3])[0]
    ends = [i for stop in settings["until"] if (i := whole[1].find(stop)) >= 0]
    assert found[1] == whole[1][: min(ends, default=None)]


def test_generation_keeps_the_end_of_a_context_that_is_too_long(adapter, said):
    settings = {"max_gen_toks": 8}
    text = bytes(range(40, 110)).decode()
    long, short = adapter.generate_until([Request(text, settings), Request(text[-24:], settings)])
    assert long == short
    assert said == ["1 of 2 contexts cut on the left to fit model.max_seq_len=32 with 8 new tokens"]


@pytest.mark.parametrize("length, made", [(1, 1), (9, 2), (99, 3)])
def test_generation_goes_on_until_all_texts_of_a_batch_have_ended(
    adapter, monkeypatch, length, made
):
    import inl_jax.harness.adapter as module

    counted = []

    def pieces(*arguments, **settings):
        for piece in decoding.pieces(*arguments, **settings):
            counted.append(piece)
            yield piece

    monkeypatch.setattr(module, "pieces", pieces)
    monkeypatch.setattr(
        module, "is_settled", lambda text, until: len(text) >= length and until == ["\n\n"]
    )
    settings = {"max_gen_toks": 24, "until": ["\n\n"]}
    adapter.generate_until([Request(prompt, settings) for prompt in ("ab", "cd")])
    assert len(counted) == made


@given(
    text=st.text("ab€", max_size=9),
    more=st.text("ab€", max_size=9),
    until=st.lists(st.text("ab€", max_size=4), max_size=3),
)
def test_a_settled_text_is_cut_where_all_longer_ones_are(text, more, until):
    from inl_jax.harness.adapter import cut, is_settled

    if is_settled(text, until):
        assert cut(text + more, until) == cut(text, until)
    longest = max(map(len, until), default=0)
    assert is_settled(text + "." * longest, until) == (cut(text, until) != text)


def settings_of(given):
    from inl_jax.harness.adapter import generation_settings

    return generation_settings(given, 300)


def test_settings_of_generation_are_read_as_lm_eval_gives_them():
    assert settings_of({}) == ([], 256, Sampling())
    greedy = {"until": "x", "max_new_tokens": 4, "do_sample": False, "temperature": 0.7}
    assert settings_of(greedy) == (["x"], 4, Sampling())
    drawn = {"do_sample": True, "top_k": 3, "max_gen_toks": "7"}
    assert settings_of(drawn) == ([], 7, Sampling(temperature=1.0, top_k=3))
    assert settings_of({"temperature": 0.5, "min_p": 0.1})[2] == (
        Sampling(temperature=0.5, min_p=0.1)
    )
    penalized = settings_of({"do_sample": False, "repetition_penalty": 1.2})
    assert penalized[2] == Sampling(repetition_penalty=1.2)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "num_beams=4: a setting of generation that is not there"),
        ({"until": 5}, "until=5: must be a text or a list of texts"),
        ({"max_tokens": "many"}, "max_tokens=many: must be a positive whole number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be a positive whole number"),
        ({"max_gen_toks": 300}, "max_gen_toks=300: leaves no room for a context"),
        ({"top_p": 2.0}, "top_p=2.0: must be above 0 and at most 1"),
        ({"temperature": "hot"}, "temperature=.hot.: must be of type float"),
    ],
)
def test_settings_of_generation_that_are_impossible_are_one_line(given, message):
    with pytest.raises(InputError, match=message):
        settings_of(given)


@pytest.fixture(scope="module")
def requests(trained):
    """Requests on a run, by their type."""
    from lm_eval.api.instance import Instance

    from inl_jax.harness.tasks import load_tasks

    (task,) = load_tasks(trained[1], ["bpb"])["tasks"].values()
    task.build_all_requests()
    contexts = ("", "the quick brown ", "a context that is longer than the model can read")
    choices = (" fox", "dog", " lazy wizards")
    pairs = [(context, choice) for context in contexts for choice in choices]
    made = {
        "rolling": task.instances,
        "choices": [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
    }
    settings = {"max_gen_toks": 8, "until": ["\n"], "do_sample": False}
    prompts = ("the quick", "fox", "a prompt that is longer than the model can read at once")
    made["generated"] = [
        Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)
    ]
    return made


def test_an_exported_model_has_the_same_numbers_in_the_adapter_of_transformers(
    trained, requests, tmp_path
):
    """And both have those of full passes by `apply`: test_scoring.py."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    from inl_jax.harness.adapter import RunLM
    from inl_jax.interop.exported.modeling_inl import InlForCausalLM
    from inl_jax.interop.exporter import export

    export(trained[1], tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = HFLM(
        InlForCausalLM.from_pretrained(tmp_path / "exported").eval(),
        tokenizer=tokenizer,
        batch_size=4,
        logits_cache=False,  # with it the same tokens, cut at other places, have wrong numbers
    )
    ours = RunLM(str(trained[1]), batch_size=4)
    assert theirs.max_length == ours.max_length
    assert theirs.prefix_token_id == ours.prefix_token_id

    found, expected = (lm.loglikelihood(requests["choices"]) for lm in (ours, theirs))
    np.testing.assert_allclose([a[0] for a in found], [b[0] for b in expected], rtol=1e-4)
    assert [a[1] for a in found] == [b[1] for b in expected]
    found, expected = (lm.loglikelihood_rolling(requests["rolling"]) for lm in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    found, expected = (lm.generate_until(requests["generated"]) for lm in (ours, theirs))
    assert found == expected
