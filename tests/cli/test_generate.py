import os

import pytest

CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]  # set in conftest.py


FLAGS = ["--max_new_tokens", 5, "--temperature", 0, "--prompt", "the quick", "a", ""]


def test_generate_continues_every_prompt(trained, inl):
    code, out, err = inl("generate", "--checkpoint", trained[1], *FLAGS)
    assert err == f"compiled programs are kept in {CACHE}\n"
    assert code == 0 and out.startswith("the quick") and out.count("-" * 40) == 3


@pytest.mark.slow
def test_generate_gives_the_same_text_on_any_mesh(trained, inl):
    _, out, _ = inl("generate", "--checkpoint", trained[1], *FLAGS)
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2]
    code, split, err = inl("generate", "--checkpoint", trained[1], *mesh, *FLAGS)
    assert code == 0 and split.splitlines()[:-1] == out.splitlines()[:-1], err


def test_generate_names_a_run_that_is_not_there(inl):
    code, _, err = inl("generate", "--checkpoint", "nowhere")
    assert code == 2 and "nowhere: not a run directory" in err
