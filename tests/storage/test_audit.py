import shutil

from inl_jax.storage import audit
from inl_jax.storage.manifest import write_manifest


def test_check_checkpoints_leaves_out_what_a_training_deletes_meanwhile(tmp_path, monkeypatch):
    verify = audit.verify
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "data").write_text("x")
        write_manifest(folder)

    def verify_late(step_dir):
        if step_dir.name == "1":
            shutil.rmtree(step_dir)
        return verify(step_dir)

    monkeypatch.setattr(audit, "verify", verify_late)
    assert list(audit.check_checkpoints(tmp_path)) == [audit.Finding("checkpoint 2", "good")]
