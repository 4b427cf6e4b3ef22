import json
import shutil
import sys

import numpy as np
import pytest
from conftest import assert_same
from exported_dir import to_named
from inl_process import run
from lively import lively_params, save_run

from inl_jax.config import InputError
from inl_jax.failures import DiskFull
from inl_jax.interop import export
from inl_jax.interop.exported_config import from_json_fields
from inl_jax.sampling import LanguageModel
from inl_jax.storage.weights import read_params

safetensors = pytest.importorskip("safetensors.numpy", reason="the hf extra is not installed")
SHARD = 9_000  # bytes: several files, and the embedding alone is larger


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained run, exported in shards."""
    out = tmp_path_factory.mktemp("exported") / "new" / "model"
    assert export(trained[1], out, step="best", max_shard_bytes=SHARD) == 4
    return out


def weights_in(folder):
    """Every array of an export, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.load_file(file)
    return found


def read_object(path):
    return json.loads(path.read_text())


def test_export_holds_the_weights_of_the_run_bit_for_bit(exported, trained):
    model = LanguageModel.from_run(trained[1])
    named = to_named(model.params, model.config)
    assert_same(dict(sorted(weights_in(exported).items())), dict(sorted(named.items())))


def test_large_weights_are_split_and_the_index_finds_each(exported):
    index = read_object(exported / "model.safetensors.index.json")
    files = {file.name: safetensors.load_file(file) for file in exported.glob("*.safetensors")}
    assert len(files) > 2
    found = {name: file for file, arrays in files.items() for name in arrays}
    assert index["weight_map"] == found
    sizes = [sum(a.nbytes for a in arrays.values()) for arrays in files.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(
        size <= SHARD or len(arrays) == 1
        for size, arrays in zip(sizes, files.values(), strict=True)
    )


def test_config_of_an_export_is_that_of_the_run(exported, trained):
    model = LanguageModel.from_run(trained[1]).config
    found = read_object(exported / "config.json")
    fields = from_json_fields(found, param_dtype=found["dtype"], of="config.json")
    assert fields == type(model)(**vars(model) | {"remat": fields.remat})
    assert set(found["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for place in found["auto_map"].values():
        module, name = place.split(".")
        assert f"class {name}(" in (exported / f"{module}.py").read_text()
    generation = read_object(exported / "generation_config.json")
    assert generation["suppress_tokens"] == list(range(257, 300)), "ids without a text"
    for settings in (found, generation):
        assert {settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {256}


def test_files_of_an_export_may_be_read_by_those_who_may_read_any(exported):
    modes = {file.stat().st_mode for file in exported.iterdir()}
    assert len(modes) == 1


def test_bfloat16_is_the_nearest_and_said(trained, tmp_path, said):
    export(trained[1], tmp_path / "out", dtype="bfloat16")
    assert "weights of float32 were rounded to the nearest bfloat16" in said
    model = LanguageModel.from_run(trained[1])
    named = to_named(model.params, model.config)
    for name, array in weights_in(tmp_path / "out").items():
        assert array.dtype == "bfloat16"
        step = np.spacing(array).astype(np.float32)
        assert (np.abs(array.astype(np.float32) - named[name]) <= np.abs(step) / 2).all(), name


def test_full_disk_leaves_nothing_of_an_export(trained, tmp_path, monkeypatch):
    def fail(arrays, file, **_):
        file.write_bytes(b"half")
        raise safetensors_error("Error while serializing: I/O error: No space (os error 28)")

    safetensors_error = sys.modules["safetensors"].SafetensorError
    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(DiskFull, match="out: .*the export takes .*nothing of it is left"):
        export(trained[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing(exported, trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name, message in (
        ("file", "exists; name a new directory"),
        ("full", "is not empty; name a new directory"),
        ("link", "exists; name a new directory"),
        ("empty", "name a new directory in it, such as .*empty/model"),
        ("file/below", "File exists; name another path"),
    ):
        with pytest.raises(InputError, match=f"out={tmp_path}/{name}: {message}"):
            export(trained[1], tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


def test_empty_directory_may_be_exported_to(trained, tmp_path):
    (tmp_path / "out").mkdir()
    export(trained[1], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_damaged_checkpoint_is_not_exported(trained, tmp_path):
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    with open(next((run_dir / "checkpoints/4/params").rglob("d/*")), "r+b") as file:
        file.write(b"flipped")
    with pytest.raises(InputError, match="checkpoints/4 is damaged"):
        export(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_safetensors_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"pip install 'inl_jax\[hf\]'"):
        export(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dtype", "float16"], "choose from"),
        (["--private"], "--private: is for --push"),
        (["--push", "a--b/c"], "push=a--b/c"),
        (["--step", "7"], "no checkpoint '7'; there are [4]"),
        (["--out", "a.pt", "--push", "a/b"], "--push a/b: is for a directory"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(inl, trained, tmp_path, words, message):
    code, _, err = inl("export", trained[1], "--out", tmp_path / "out", *words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_verb_exports_and_pushes(inl, trained, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("inl_jax.interop.push.push", lambda *a, **k: pushed.append((a, k)) or "url")
    monkeypatch.setenv("HF_TOKEN", "a token")
    out = tmp_path / "out"
    code, said, err = inl("export", trained[1], "--out", out, "--push", "me/tiny", "--private")
    assert code == 0, err
    assert f"{out}: update 4, 47.38 KiB of float32 in 1 file\npushed: url\n" in said
    assert pushed == [((out, "me/tiny"), {"private": True})]


@pytest.mark.slow
def test_published_file_comes_back_bit_for_bit(inl, train_config, tmp_path):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    config = train_config(model={"context": "mean", "kappa": float("inf")})
    lively_params(config.model)["blocks"]["integrator"]["gamma"] *= 0
    params = save_run(config)
    file = tmp_path / "model.pt"
    code, out, err = inl("export", config.run_dir, "--out", file)
    assert code == 0, err
    assert "lm_head.weight" in torch.load(file, weights_only=True)
    words = out.partition("inl import needs: ")[2].split()  # the advice is followed
    code, _, err = inl("import", "--weights", file, *words, "--out", tmp_path / "back")
    assert code == 0, err
    assert_same(read_params(tmp_path / "back", config.model)[1], params)
    code, _, err = inl("export", config.run_dir, "--out", file)
    assert code == 2 and "exists; name a new file" in err


@pytest.mark.slow
def test_layers_with_different_contexts_go_out_and_come_back(inl, train_config, tmp_path):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    config = train_config(model={"context": "gated", "attention_every": 2})
    params = save_run(config)
    code, _, err = inl("export", config.run_dir, "--out", tmp_path / "model.pt")
    assert code == 2 and "model.attention_every=2: in the published model it is 0" in err
    code, _, err = inl("export", config.run_dir, "--out", tmp_path / "model")
    assert code == 0, err
    code, _, err = inl("import", "--weights", tmp_path / "model", "--out", tmp_path / "back")
    assert code == 0, err
    assert_same(read_params(tmp_path / "back", config.model)[1], params)


@pytest.mark.slow
def test_code_of_the_card_continues_a_text_as_we_do(exported, trained, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = (exported / "README.md").read_text().split("```")[1].removeprefix("python\n")
    code = (
        code.replace("=50", "=10")
        + """
import sys
from transformers import AutoModel
body = AutoModel.from_pretrained(name, trust_remote_code=True)
assert body(**inputs)[0].equal(model.model(**inputs)[0])
sys.stdout.write(text)
"""
    )
    status, text, err, _ = run(sys.executable, "-c", code, cwd=exported)
    assert status == 0, err
    model = LanguageModel.from_run(trained[1])
    assert text == "Once upon" + model.generate("Once upon", max_new_tokens=10)
