import pytest
from hub import COMMITS, Hub
from texts import split_texts

from inl_jax.config import InputError
from inl_jax.data.pins import pin, pinned_paths, pinned_tokenizer

A, B = COMMITS["main"], COMMITS["v2"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path)


def test_tokens_are_kept_by_commit(make_corpus, hub):
    first = make_corpus("hf:owner/name", validation_fraction=0).sources[0]
    assert split_texts(first, "train")[0] == f"{A} row 0"
    hub.commits[None] = B
    second = make_corpus("hf:owner/name", validation_fraction=0).sources[0]
    assert split_texts(second, "train")[0] == f"{B} row 0"
    hub.online = False
    again = make_corpus(f"hf:owner/name#{A}", validation_fraction=0).sources[0]
    assert again == first


def test_only_what_is_on_the_hub_is_pinned(hub, tmp_path, said):
    paths = ("stdlib", str(tmp_path), f"hf:{tmp_path}", "hf:", f"hf:owner/name#{A}")
    assert pinned_paths(paths) == paths
    for name in ("bytes", "gpt2", "bpe:300", str(tmp_path), f"owner/name#{A}", "none.json"):
        assert pinned_tokenizer(name) == name
    assert hub.asked == [] and said == []


def test_tokenizer_of_the_hub_is_read_at_its_commit(make_corpus, hub, tmp_path, said):
    (tmp_path / "a.txt").write_text("some text")
    make_corpus(tmp_path / "a.txt", tokenizer="owner/name")
    assert hub.asked == ["model owner/name None", f"tokenizer owner/name {A}"]
    assert said[0] == f"data: owner/name: owner/name#{A}"


def test_pin_asks_the_hub_unless_a_commit_is_known(hub):
    assert pin("hf:owner/name@en#v2", "dataset") == f"hf:owner/name@en#{B}"
    assert pin("owner/name", "model") == f"owner/name#{A}"
    assert hub.asked == ["dataset owner/name v2", "model owner/name None"]
    hub.asked.clear()
    recorded = (f"hf:owner/name@de#{A}", f"hf:owner/name@en#{B}")
    assert pin("hf:owner/name@en", "dataset", recorded) == recorded[1]
    assert pin("hf:owner/name@en#main", "dataset", recorded) == recorded[1]
    assert pin(f"hf:owner/name@en#{A}", "dataset", recorded) == f"hf:owner/name@en#{A}"
    assert hub.asked == []
    assert pin("hf:owner/name", "dataset", (*recorded, "hf:owner/name")) == f"hf:owner/name#{A}"


def test_pin_without_the_hub_takes_what_was_fetched_before(hub):
    hub.online = False
    with pytest.raises(InputError, match="no dataset of it with the revision v2 .no route.; check"):
        pin("hf:owner/name#v2", "dataset")
    hub.fetched = B
    assert pin("owner/name", "model") == f"owner/name#{B}"
