import importlib
from pathlib import Path

import pytest


@pytest.mark.slow
def test_twin_has_the_parameters_of_nanogpt_and_learns(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    peer, twin = importlib.import_module("peer_step"), importlib.import_module("torch_twin")
    config = peer.CASES["128 wide"]
    c, D = config.model, config.model.d_model
    blocks = c.num_layers * (12 * D * D + 2 * D)
    wanted = blocks + D + (c.vocab_size + config.data.seq_len) * D
    assert sum(p.numel() for p in twin.GPT(config).parameters()) == wanted
    update = twin.make_update(config)
    batch = torch.from_numpy(peer.tokens(config)).long()
    losses = [float(update(batch)) for _ in range(10)]
    assert losses[0] == pytest.approx(4.17, abs=0.2) and losses[-1] < losses[0] - 0.02
