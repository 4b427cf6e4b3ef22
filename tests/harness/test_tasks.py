import json

import pytest

from inl_jax.harness import tasks as module

QUESTION = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of tasks: `far` has its data nowhere, and `wrong` an answer that is no choice."""
    pytest.importorskip("lm_eval")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"Is {i} a number?"}) + "\n" for i in range(5)))
    for name, end in (("plain", ""), ("unsafe", "unsafe_code: true\n")):
        (tmp_path / f"{name}.yaml").write_text(QUESTION.format(name=name, rows=rows) + end)
    far = QUESTION.format(name="far", rows=rows).replace("path: json", "path: nobody/nothing")
    (tmp_path / "far.yaml").write_text(far)
    wrong = QUESTION.format(name="wrong", rows=rows).replace("target: 0", "target: 7")
    (tmp_path / "wrong.yaml").write_text(wrong)
    talks = QUESTION.format(name="talks", rows=rows).replace("multiple_choice", "generate_until")
    (tmp_path / "talks.yaml").write_text(talks.replace("metric: acc", "metric: exact_match"))
    return tmp_path


def test_a_missing_lm_eval_is_one_line(trained, inl, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    code, out, err = inl("evaluate", trained[1], "--tasks", "bpb")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: --tasks: needs lm_eval; pip install 'inl_jax[harness]'"


@pytest.mark.slow
def test_results_are_a_table_or_json_alone_on_stdout(trained, inl, folder, tmp_path):
    saved = tmp_path / "results.json"
    run = ("evaluate", trained[1], "--include_path", folder, "--num_fewshot", 1, "--limit", 4)
    code, out, err = inl(*run, "--tasks", "plain,bpb", "--output", saved)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split("|")[1].strip() == "Tasks" and all(line[0] == "|" for line in lines)
    assert {line.split("|")[1].strip() for line in lines[2:]} == {"bpb", "plain", ""}
    found = json.loads(saved.read_text())
    assert found["checkpoint"] == str(trained[1]) and found["lm_eval"]
    assert found["n-shot"] == {"bpb": 0, "plain": 1}
    assert found["n-samples"]["plain"]["effective"] == 4
    assert found["results"]["plain"]["acc_stderr,none"] >= 0

    code, out, err = inl(*run, "--tasks", "plain", "--json", "--mesh.data", 2, "--mesh.fsdp", 2)
    assert code == 0, err
    assert json.loads(out)["results"]["plain"] == found["results"]["plain"]


@pytest.mark.slow
def test_a_task_that_cannot_run_is_one_line(trained, inl, folder, monkeypatch):
    import datasets

    def refused(task):
        named = task.split(" ")
        code, out, err = inl("evaluate", trained[1], "--include_path", folder, "--tasks", *named)
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    assert refused("plian").endswith("--tasks plian: no such task; the closest is plain")
    assert "--tasks unsafe: runs code that the model writes; add --confirm_run" in refused("unsafe")
    assert refused("plain --num_fewshot 6").endswith(
        "--num_fewshot 6: --tasks plain has 5 documents to take examples from; lower it to 4"
    )
    assert "--tasks wrong: lm_eval cannot load it (IndexError" in refused("wrong")
    assert "max_gen_toks=256: leaves no room for a context" in refused("talks")
    assert "task needle: a question has more than 32 tokens" in refused("needle")

    def load_dataset(**_):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "cannot be fetched (Couldn't reach 'nobody/nothing' on the Hub); run" in refused("far")


@pytest.mark.slow
def test_a_task_that_runs_code_runs_if_the_user_confirms_it(trained, inl, folder):
    code, out, err = inl(
        *("evaluate", trained[1], "--tasks", folder / "unsafe.yaml", "--confirm_run_unsafe_code")
    )
    assert code == 0 and "unsafe" in out, err
