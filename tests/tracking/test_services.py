import json
import math
import struct

import pytest

from inl_jax.tracking.services import HostedRun, scalars

EVALUATION = {
    "step": 4,
    "validation_loss": 2.0,
    "validation_perplexity": 7.4,
    "validation_bits_per_byte": 1.2,
    "gap": 0.1,
    "sources": {"code": {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 0.9}},
}


def test_scalars_names_the_numbers_of_an_update():
    record = {"step": 4, "loss": 2.5, "peak_memory": 3 * 2**30, "gpu_watts": 650, "skipped": 0}
    assert scalars(record) == {"train/loss": 2.5, "mem/peak_gib": 3, "gpu/watts": 650}


def test_scalars_names_validation_and_each_source():
    assert scalars(EVALUATION) == {
        "val/loss": 2.0,
        "val/perplexity": 7.4,
        "val/bits_per_byte": 1.2,
        "val/gap": 0.1,
        "val/loss/code": 1.5,
        "val/perplexity/code": 4.5,
        "val/bits_per_byte/code": 0.9,
    }


def test_scalars_reduces_dynamics_to_the_last_iteration_over_the_layers():
    dynamics = {"rms_error": [[9, 1], [9, 3]], "cosine": [[None], [None]]}
    assert scalars({"step": 4, "dynamics": dynamics}) == {
        "dynamics/rms_error/mean": 2,
        "dynamics/rms_error/lowest": 1,
        "dynamics/rms_error/highest": 3,
    }


def test_scalars_leaves_out_what_is_missing_or_not_finite():
    record = {"step": 4, "loss": math.nan, "perplexity": math.inf, "grad_norm": None}
    assert scalars(record | {"sources": {"code": {"loss": None}}}) == {}


def leveldb_entries(data):
    """The entries of a file in blocks of 32 KiB, as LevelDB logs are, without its header."""
    at, entry = 0, b""
    while at < len(data):
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


@pytest.mark.slow
def test_wandb_takes_every_record_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "trackers"
    folder.mkdir()
    (folder / "id.json").write_text('{"id": "run-1"}')
    run = HostedRun("wandb", tmp_path, "project", {"config": {"seed": 1}})
    sample = {"prompt": "a", "greedy": "ab", "sampled": "ac"}
    # The evaluation of an update comes after later updates of a branch that was lost.
    for record in ({"step": 9, "loss": 2.5}, EVALUATION, {"step": 4, "samples": [sample]}):
        run.write(record)
    run.close()

    [path] = folder.glob("wandb/offline-run-*-run-1/*.wandb")
    rows, parameters = [], {}
    for data in leveldb_entries(path.read_bytes()[7:]):
        record = Record.FromString(data)
        parameters |= {item.key: item.value_json for item in record.run.config.update}
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        rows += [row] if row else []
    assert json.loads(parameters["config"]) == {"seed": 1}
    assert [row["update"] for row in rows] == [9, 4, 4]
    assert rows[0]["train/loss"] == 2.5
    assert rows[1].items() >= scalars(EVALUATION).items()
    assert rows[2]["samples/nrows"] == 1
