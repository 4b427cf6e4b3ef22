import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from conftest import assert_same, mesh_of
from exported_dir import write_exported
from lively import lively_params

from inl_jax.data.corpus import prepare
from inl_jax.start import Start, restore_or_init
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


def test_exported_weights_start_a_run_on_any_mesh(train_config, tmp_path, said):
    config = train_config(model={"param_dtype": "bfloat16"})
    params = lively_params(config.model)
    exported = write_exported(tmp_path / "exported", params, config.model)
    begun = dataclasses.replace(config, init_from=str(exported))
    layout = make_layout(begun, mesh_of(fsdp=4))
    nothing_saved = SimpleNamespace(restore=lambda _: None)
    make_state, start = restore_or_init(begun, layout, nothing_saved, None)
    state = make_state()
    assert_same(state.params, params)
    assert state.params["embedding"].sharding == layout.state.params["embedding"].sharding
    assert start == Start() and int(state.step) == 0
    assert said == [
        f"starting from the weights of {exported}, an exported model (57 arrays of type BF16 in 1 "
        "file)"
    ]
