import numpy as np
import pytest
from conftest import MODEL
from lively import lively_params

from inl_jax.config import InputError, ModelConfig
from inl_jax.sampling import LanguageModel, generate
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


def test_generation_keeps_the_end_of_a_context_that_is_too_long(adapter):
    settings = {"max_gen_toks": 8}
    text = bytes(range(40, 110)).decode()
    long, short = adapter.generate_until([Request(text, settings), Request(text[-24:], settings)])
    assert long == short


def test_settings_of_generation_are_read_as_lm_eval_gives_them():
    from inl_jax.harness.adapter import generation_settings

    assert generation_settings({}) == ([], 256, {})
    greedy = {"until": "x", "max_new_tokens": 4, "do_sample": False, "temperature": 0.7}
    assert generation_settings(greedy) == (["x"], 4, {})
    drawn = {"do_sample": True, "top_k": 3, "max_gen_toks": "7"}
    assert generation_settings(drawn) == ([], 7, {"temperature": 1.0, "top_k": 3})
    assert generation_settings({"temperature": 0.5})[2] == {"temperature": 0.5}
    with pytest.raises(InputError, match="num_beams=4: a setting of generation that is not there"):
        generation_settings({"num_beams": 4})


def test_a_task_that_asks_for_too_many_tokens_is_one_line(adapter):
    with pytest.raises(InputError, match="max_gen_toks=256: leaves no room for a context"):
        adapter.generate_until([Request("a", {})])


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
    from inl_jax.interop.export import export
    from inl_jax.interop.exported.modeling_inl import InlForCausalLM

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
