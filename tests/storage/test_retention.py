import json
from types import SimpleNamespace

import pytest

from inl_jax.storage.retention import Retention, read_best


@pytest.mark.parametrize(
    "keep_last, best, good, kept",
    [
        (2, None, None, [4, 5]),
        (1, 2, None, [2, 5]),
        (1, 2, 3, [2, 3, 5]),
        (9, None, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_retention_keeps_the_newest_the_best_and_the_last_known_to_be_good(
    tmp_path, keep_last, best, good, kept
):
    if best:
        (tmp_path / "best.json").write_text(json.dumps({"step": best, "validation_loss": 1.0}))
    retention = Retention(keep_last, tmp_path / "best.json")
    retention.good = good
    steps = range(1, 6)
    preserved = retention.should_preserve([SimpleNamespace(step=step) for step in steps])
    assert [step for step, keep in zip(steps, preserved, strict=True) if keep] == kept


@pytest.mark.parametrize("text", ["[" * 10_000, '{"step": null}', '{"step": 3}', ""])
def test_read_best_takes_a_damaged_note_for_none(tmp_path, text):
    (tmp_path / "best.json").write_text(text)
    assert read_best(tmp_path / "best.json") == {}
    (tmp_path / "best.json").unlink()
    (tmp_path / "best.json").mkdir()
    assert read_best(tmp_path / "best.json") == {}
