from types import SimpleNamespace

from inl_jax.watch.samples import make_samples, write_samples


def test_make_samples_continues_each_prompt_greedily_and_with_one_seed():
    calls = []

    def generate(prompts, **settings):
        calls.append(settings)
        return [f" {prompt} {settings.get('temperature', 0)}" for prompt in prompts]

    found = make_samples(SimpleNamespace(generate=generate), ["a", "b"], max_new_tokens=5)
    assert found == [
        {"prompt": "a", "greedy": " a 0", "sampled": " a 0.8"},
        {"prompt": "b", "greedy": " b 0", "sampled": " b 0.8"},
    ]
    assert calls == [{"max_new_tokens": 5}, {"max_new_tokens": 5, "temperature": 0.8, "seed": 0}]


def test_write_samples_keeps_text_that_looks_like_markdown(tmp_path):
    sample = {"prompt": "# no title\n", "greedy": "```\ncode", "sampled": "\ud800 drawn"}
    path = write_samples(tmp_path, 500, [sample])
    assert path == tmp_path / "samples" / "000500.md"
    text = path.read_text()
    assert "````\n# no title\n```\ncode\n````" in text, "a fence longer than any inside"
    assert "\\ud800 drawn" in text and text.count("\n# no title") == 3, "fenced each time"
