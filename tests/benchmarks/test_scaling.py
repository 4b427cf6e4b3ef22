import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_bandwidth_is_that_of_the_slowest_link_of_a_ring(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bandwidth = importlib.import_module("scaling").bandwidth
    shape = {"data": 64, "fsdp": 8, "tensor": 1}
    assert bandwidth(("fsdp",), shape) == 450e9  # within a node
    assert bandwidth(("data",), shape) == 50e9  # one adapter for each ring
    assert bandwidth(("data", "fsdp"), shape) == 400e9  # eight
    assert bandwidth(("fsdp",), {"data": 1, "fsdp": 64, "tensor": 1}) == 400e9
    assert bandwidth(("tensor",), {"data": 8, "fsdp": 4, "tensor": 2}) == 450e9
    assert bandwidth(("fsdp",), {"data": 1, "fsdp": 16, "tensor": 4}) == 100e9


@pytest.mark.slow
def test_scaling_predicts_an_update_from_what_devices_send(tmp_path):
    flags = "--config tiny --meshes 1x1x1 1x2x1 --compile cpu --json --model.num_layers 1".split()
    flags += ["--model.context", "attention", "--model.num_iterations", "0"]  # to compile faster
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/scaling.py", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, pair = json.loads(done.stdout)["rows"]
    assert alone["sent, GB"] == 0 and alone["of linear"] == [1, 1]
    assert pair["computing, s"] == alone["computing, s"] / 2
    assert pair["update, s"] == [
        max(pair["computing, s"], pair["exchanging, s"]),
        pair["computing, s"] + pair["exchanging, s"],
    ]
    assert pair["sent, GB"] > 0
