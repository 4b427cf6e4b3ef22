"""Damaged and mistaken files: each reader takes them, or says in one line what is wrong."""

import copy
import functools
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from conftest import mesh_of
from exported_dir import write_exported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lively import lively_params

from inl_jax.config import DataConfig, InputError, Phase
from inl_jax.config_file import load_config, override, to_json
from inl_jax.data.corpus import prepare
from inl_jax.environment import record_environment
from inl_jax.interop.exported_weights import open_exported
from inl_jax.interop.published import config_from_torch, params_from_torch, params_to_torch
from inl_jax.interop.torch_file import read_state_dict
from inl_jax.model.language_model import init_params
from inl_jax.parallel.sharding import param_shardings
from inl_jax.report.run import read_runs
from inl_jax.report.run_report import report
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.run_dir import check_run, record_run
from inl_jax.tokens.tokenizer import load, load_tokenizer, train_bpe
from inl_jax.tracking import follow as following
from inl_jax.training.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.slow

DEEP = b"[" * 100_000

JUNK = st.recursive(
    st.sampled_from([None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "\0", "é"])
    | st.integers()
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.fixture(params=[100, pytest.param(1_000, marks=pytest.mark.faults)])
def fuzz(request, tell):
    """Tries a reader on many cases. It may refuse one in a line, but not raise anything else."""

    def fuzz(cases, read):
        tried = refused = 0

        @settings(
            max_examples=request.param,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def run(case):
            nonlocal tried, refused
            tried += 1
            try:
                read(case)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)

        run()
        tell(f"{request.node.name}: {tried} tried, {refused} refused in a line, 0 tracebacks")

    return fuzz


@st.composite
def mutated(draw, value):
    """A JSON value of which up to three parts are removed or are others."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
                if draw(st.booleans()):
                    place[key] = draw(JUNK)
                else:
                    del place[key]
                break
            place = place[key]
    return value


@st.composite
def damaged(draw, data):
    """Bytes that were cut short, changed, doubled or lost in up to three places."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        until = draw(st.integers(at, min(len(data), at + 20)))
        data[at:until] = draw(
            st.sampled_from([b"", data[at:], data[at:until] * 2, b"\0", b"\xff", b"9" * 20])
            | st.binary(max_size=4)
        )
        if draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def files_of(value):
    """The bytes of a JSON file that once held `value`."""
    return (
        mutated(value).map(lambda changed: json.dumps(changed).encode())
        | damaged(json.dumps(value).encode())
        | st.binary(max_size=50)
        | st.just(DEEP)
    )


def log_lines(records):
    """The bytes of a metrics.jsonl in which some lines are damaged."""
    line = st.sampled_from(records).flatmap(
        lambda record: st.just(json.dumps(record).encode()) | files_of(record)
    )
    return st.lists(line, max_size=12).map(b"\n".join) | st.binary(max_size=50)


UPDATE = {"step": 2, "num_steps": 9, "time": 1.8e9, "elapsed": 60.0, "loss": 3.0, "skipped": 0}
UPDATE |= {"perplexity": 20.0, "learning_rate": 1e-3, "grad_norm": 1.0, "seconds_per_step": 0.5}
UPDATE |= {"tokens_per_second": 10.0, "input_wait": 0.0, "seconds_left": 4.0, "samples_seen": 4}
EVALUATION = {"step": 2, "num_steps": 9, "validation_loss": 3.0, "validation_perplexity": 20.0}
EVALUATION |= {"validation_bits_per_byte": 2.0, "validation_tokens": 9, "basis": "b", "best": True}
EVALUATION |= {"sources": {"a": {"loss": 3.0}}, "gap": 0.1, "train_loss": 3.0, "verdict": "good"}
SAMPLES = {"step": 2, "num_steps": 9, "samples": [{"prompt": "a", "greedy": "b", "sampled": "c"}]}
RECORDS = [UPDATE, UPDATE | {"step": 4}, EVALUATION, SAMPLES, {"resumed_from": 2}]
START = {"time": "2026-01-01T00:00:00+00:00", "host": "here", "command": "inl train"}
START |= {"devices": {"kind": "cpu", "count": 1, "platform": "cpu"}}


def test_metrics(fuzz, tmp_path):
    def read(data):
        (tmp_path / "metrics.jsonl").write_bytes(data)
        steps = [record["step"] for record in read_metrics(tmp_path, up_to=10**9)]
        assert steps == sorted(steps)
        log = MetricsLog(tmp_path)
        log.resume_from(1)
        log.close()

    fuzz(log_lines(RECORDS), read)


def test_reports(fuzz, tmp_path, train_config):
    pytest.importorskip("plotly")
    config = json.loads(to_json(train_config()))
    files = {
        "config.json": files_of(config),
        "env.json": files_of({"starts": [START, START]}),
        "best.json": files_of({"step": 2, "validation_loss": 3.0, "basis": "b"}),
        "metrics.jsonl": log_lines(RECORDS),
    }

    def read(contents):
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        assert "<html" in report(read_runs([str(tmp_path)]))

    fuzz(st.fixed_dictionaries(files), read)


def test_environments(fuzz, tmp_path):
    path = tmp_path / "env.json"

    def read(data):
        path.write_bytes(data)
        record_environment(tmp_path)

    fuzz(files_of({"starts": [START]}), read)


def test_configs_of_runs(fuzz, tmp_path, train_config):
    config = train_config(
        data={"phases": (Phase(share=0.5, weights=(1.0,)), Phase(share=0.5, weights=(1.0,)))}
    )
    tokenizer = load_tokenizer("bytes")
    record_run(config, tokenizer)
    path = tmp_path / "run" / "config.json"

    def read(data):
        path.write_bytes(data)
        check_run(config, tokenizer)

    fuzz(files_of(json.loads(to_json(config))), read)


def test_config_files(fuzz, tmp_path):
    path = tmp_path / "config.py"
    source = b"""from inl_jax import TrainConfig, ModelConfig
config = TrainConfig(name="a", model=ModelConfig(d_model=16, num_layers=2), num_steps=5)
"""
    values = JUNK.map(lambda value: source.replace(b"num_steps=5", f"num_steps={value!r}".encode()))
    # Not every damage: a config file is code, and code can do anything.
    fuzz(values | st.just(source), lambda data: (path.write_bytes(data), load_config(path)))


def test_phases(fuzz, train_config):
    config = train_config()
    words = st.sampled_from(["0.5:1", "0.5@16:1", "1:1", "500:1"]) | st.text(max_size=8)
    words |= damaged(b"0.5@16:1").map(lambda data: data.decode(errors="replace"))
    words |= st.text(alphabet="0123456789.,:@-einfa ", max_size=12)

    def read(found):
        for word in found:
            assert Phase.parse(str(Phase.parse(word))) == Phase.parse(word)
        override(config, ["--data.phases", *found])

    fuzz(st.lists(words, min_size=1, max_size=3), read)


def test_tokenizers(fuzz, tmp_path):
    train_bpe(["the cat sat on the mat " * 9], 280).save(tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: json.loads((tmp_path / name).read_text()) for name in names}
    files = {
        name: st.just(json.dumps(value).encode()) | files_of(value) for name, value in whole.items()
    }

    def read(contents):
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        tokenizer = load(tmp_path)
        ids = tokenizer.encode("the cat sat")
        tokenizer.decode(ids)
        assert len(ids) == 0 or ids.max() < tokenizer.vocab_size

    fuzz(st.fixed_dictionaries(files), read)


def test_published_weights(fuzz, model_config):
    config = model_config(context="mean", kappa=float("inf"), vocab_size=20)
    params = init_params(config, jax.random.key(0))
    params["blocks"]["integrator"]["gamma"] *= 0
    whole = params_to_torch(params, config)
    arrays = st.sampled_from(
        [
            np.zeros((16, 16)),
            np.zeros(16),
            np.zeros((0, 3)),
            np.zeros(()),
            np.full((16, 16), np.nan),
            np.zeros((16, 16), complex),
            np.zeros((1, 2, 3), np.int8),
            np.array("text"),
            np.array([None]),
            None,
            "text",
            [[1.0], [2.0, 3.0]],
        ]
    )
    names = st.sampled_from(sorted(whole)) | st.text(max_size=5) | st.integers()
    names |= st.integers(0, 10**20).map(lambda i: f"layers.{i}.inl.mu")

    def read(changes):
        weights = dict(whole)
        for name, value in changes:
            weights[name] = value
            if value is None:
                del weights[name]
        params_from_torch(weights, config_from_torch(weights, num_iterations=3))

    fuzz(st.lists(st.tuples(names, arrays), min_size=1, max_size=2), read)


def test_exported_models(fuzz, tmp_path, model_config):
    """A header or the JSON; a changed byte of a weight is another weight, and nothing tells."""
    config = model_config(vocab_size=20)
    params = lively_params(config)
    write_exported(tmp_path, params, config, shards=2, head=True)
    shardings = param_shardings(mesh_of(), config)
    names = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    shard = whole[names[2]]
    end = 8 + int.from_bytes(shard[:8], "little")
    headers = mutated(json.loads(shard[8:end])).map(lambda header: json.dumps(header).encode())
    shards = headers.map(lambda header: len(header).to_bytes(8, "little") + header + shard[end:])
    shards |= damaged(shard[:end]).map(lambda header: header + shard[end:])
    shards |= st.integers(0, len(shard)).map(lambda length: shard[:length])
    cases = st.sampled_from(names[:2]).flatmap(
        lambda name: st.tuples(st.just(name), files_of(json.loads(whole[name])))
    ) | st.tuples(st.just(names[2]), shards)

    def read(case):
        name, data = case
        for other in names:
            (tmp_path / other).write_bytes(data if other == name else whole[other])
        found = open_exported(tmp_path)
        assert jax.tree.structure(found.read("float32", shardings)) == jax.tree.structure(params)

    fuzz(cases, read)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_files(fuzz, tmp_path):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    path = tmp_path / "w.pt"
    torch.save({"model": {"module.token_embedding.weight": torch.ones(2, 3)}, "step": 3}, path)
    whole = path.read_bytes()
    tensors = st.sampled_from([torch.eye(2), torch.eye(2).to_sparse(), torch.ones(2).cfloat()])
    values = st.deferred(lambda: JUNK | tensors | trees)
    trees = st.dictionaries(
        st.sampled_from(["token_embedding.weight", "model.token_embedding.weight", "model", 0])
        | st.text(max_size=4),
        values,
        max_size=3,
    )

    def read(found):
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            torch.save(found, path)
        read_state_dict(path)

    fuzz(damaged(whole) | trees, read)


def test_best_checkpoints(fuzz, tmp_path, model_config):
    params = init_params(model_config(), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, params, position={})
    checkpoints.wait()

    def read(data):
        (tmp_path / "best.json").write_bytes(data)
        assert isinstance(checkpoints.best_step(), int | None)
        checkpoints.is_best(1.0, basis="b")
        checkpoints.resume_from(0)

    fuzz(files_of({"step": 1, "validation_loss": 3.0, "basis": "b"}), read)
    checkpoints.close()


def test_states_of_trackers(fuzz, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setitem(following.sys.modules, "torch", None)  # tensorboardX would load it
    (tmp_path / "trackers").mkdir()
    files = {
        "trackers/tensorboard.json": files_of({"loss": 2, "validation_loss": 2, "offset": 40}),
        "env.json": files_of({"starts": [START]}),
        "config.json": files_of({"data": {"paths": ["a"]}}),
        "metrics.jsonl": log_lines(RECORDS),
    }
    ended = threading.Event()
    ended.set()

    def read(contents):
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        following.follow("tensorboard", tmp_path, ended, str, project="p", step=2, offset=0)
        for events in tmp_path.glob("events*"):
            events.unlink()

    fuzz(st.fixed_dictionaries(files), read)


def prepare_file(path, content):
    """Makes tokens of a file with this content, anew."""
    path.write_bytes(content)
    cache = path.with_name("cache")
    shutil.rmtree(cache, ignore_errors=True)
    prepare(DataConfig(paths=(str(path),), tokenizer="bytes", cache_dir=str(cache)))


ROW = {"text": "the cat sat", "id": 3, "messages": [{"role": "user", "content": "hello"}]}
ROWS = st.lists(files_of(ROW) | st.just(json.dumps(ROW).encode()), min_size=1, max_size=5)


@pytest.mark.parametrize(
    "name, contents",
    [
        ("rows.jsonl", ROWS.map(b"\n".join)),
        ("rows.json", ROWS.map(lambda rows: b"[" + b",".join(rows) + b"]")),
        ("rows.csv", damaged(b'id,text\n1,"the cat, ""sat"""\n2,on the mat\n')),
        ("rows.tsv", damaged(b"id\ttext\n1\tthe cat sat\n2\ton the mat\n")),
        ("text.txt", damaged("the cat sät\n".encode() * 20)),
    ],
)
def test_rows_of_text(fuzz, tmp_path, name, contents):
    path = tmp_path / name
    fuzz(contents, functools.partial(prepare_file, path))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "jsonl.xz"])
def test_packed_rows(fuzz, tmp_path, kind):
    import gzip
    import lzma

    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / f"rows.{kind}"
    table = pa.table({"text": ["the cat sat", "on the mat", None] * 5, "id": list(range(15))})
    if kind == "parquet":
        parquet.write_table(table, path, write_page_checksum=True)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "".join(json.dumps(ROW) + "\n" for _ in range(9)).encode()
        path.write_bytes((gzip if kind == "jsonl.gz" else lzma).compress(lines))
    fuzz(damaged(path.read_bytes()), functools.partial(prepare_file, path))
