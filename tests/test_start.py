import json
from pathlib import Path
from types import SimpleNamespace

from conftest import mesh_of

from inl_jax.data.corpus import prepare
from inl_jax.start import restore_or_init
from inl_jax.training.state import make_layout, split_state


def test_resuming_says_if_the_records_are_gone(train_config, make_run, said):
    config = train_config()
    layout, corpus = make_layout(config, mesh_of()), prepare(config.data)
    position = {"samples_seen": 32, "seq_len": 32, "data": corpus.fingerprint}
    found = split_state(layout.state) | {"step": 4, "position": position}
    checkpoints = SimpleNamespace(restore=lambda _: found)

    _, start = restore_or_init(config, layout, checkpoints, corpus)
    assert start.step == 4
    assert any("metrics.jsonl holds no record of these updates" in line for line in said)

    Path(config.run_dir).mkdir()
    lines = "\n".join(map(json.dumps, make_run(updates=4).records))
    Path(config.run_dir, "metrics.jsonl").write_text(lines)
    said.clear()
    restore_or_init(config, layout, checkpoints, corpus)
    assert said == [f"resuming from update 4 in {config.run_dir}"]
