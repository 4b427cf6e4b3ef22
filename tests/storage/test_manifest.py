import json
import os
import random
import shutil

import pytest
from damages import damage

from inl_jax.storage.manifest import NAME, Damaged, has_manifest, verify, write_manifest


@pytest.fixture
def step_dir(tmp_path):
    """Files as a checkpoint has them, with their manifest."""
    rng, folder = random.Random(0), tmp_path / "8"
    for i, name in enumerate(("params/d/a", "params/d/b", "optimizer/d/a", "params/_METADATA")):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.randbytes(5000 >> i))
    (folder / "commit_success.txt").touch()
    write_manifest(folder)
    return folder


def noticed(folder, **share):
    """What verifying says, as a remark or an error."""
    try:
        return verify(folder, **share)
    except Damaged as error:
        return str(error)


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_verify_notices_every_damage(step_dir, count):
    rng, silent = random.Random(1), []
    for _ in range(count):
        done = damage(step_dir, rng)
        if not noticed(step_dir):
            silent.append(done.what)
        done.undo()
        assert not noticed(step_dir)
    assert not silent


def test_verify_tells_what_is_wrong(step_dir):
    with open(step_dir / "params/d/a", "r+b") as file:
        file.write(b"other")
    assert noticed(step_dir) == "params/d/a does not hold the bytes that were saved"
    os.truncate(step_dir / "params/d/a", 17)
    assert noticed(step_dir) == "params/d/a has 17 bytes, and 5000 were saved"
    os.unlink(step_dir / "params/d/a")
    assert noticed(step_dir) == "params/d/a is gone"
    (step_dir / NAME).write_text("{")
    assert "manifest.json is damaged; without that file it loads unverified" in noticed(step_dir)
    (step_dir / NAME).unlink()
    assert not has_manifest(step_dir)
    assert verify(step_dir) == "is not verified: it has no manifest"


def test_verify_notices_a_checkpoint_in_the_place_of_another(step_dir):
    os.replace(step_dir, step_dir.with_name("9"))
    with pytest.raises(Damaged, match="saved as 8"):
        verify(step_dir.with_name("9"))


def test_verify_loads_what_has_more_files_but_says_so(step_dir):
    (step_dir / "notes.txt").touch()
    assert verify(step_dir) == "also holds 'notes.txt', which training did not save"


def test_verify_leaves_out_a_folder_that_is_not_needed(step_dir):
    shutil.rmtree(step_dir / "optimizer")
    assert noticed(step_dir) == "optimizer/d/a is gone"
    assert not noticed(step_dir, without="optimizer")
    (step_dir / "params/d/b").unlink()
    assert noticed(step_dir, without="optimizer")


def test_shares_of_the_files_are_read_once_between_them(step_dir):
    for name in json.loads((step_dir / NAME).read_text())["files"]:
        content = (step_dir / name).read_bytes()
        if content:
            (step_dir / name).write_bytes(content[::-1])
            found = [bool(noticed(step_dir, part=i, parts=3)) for i in range(3)]
            assert sum(found) == 1, name
            (step_dir / name).write_bytes(content)


def test_verify_never_waits_for_a_manifest_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
        verify(tmp_path)
