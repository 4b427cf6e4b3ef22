import dataclasses

import pytest

from inl_jax.config import InputError
from inl_jax.storage.identity import Identity, check_config, newest_identity, steps_on_disk
from inl_jax.storage.manifest import write_manifest
from inl_jax.tokens.tokenizer import load_tokenizer


def test_check_config_compares_what_decides_the_function_alone(train_config, tmp_path):
    config = train_config()
    check_config(tmp_path, config, of="it", advice="mend it")  # of an older version
    Identity(config, load_tokenizer("bytes")).write(tmp_path)

    def check(**fields):
        model = dataclasses.replace(config.model, **fields)
        other = dataclasses.replace(config, model=model, seed=7)
        check_config(tmp_path, other, of="it", advice="mend it")

    check(remat="block", integrator_segment=2)
    with pytest.raises(InputError, match=r"^it has model.kappa=2.0, but .* model.kappa=1.0: mend"):
        check(kappa=2.0)


def test_newest_identity_passes_over_checkpoints_without_one(train_config, tmp_path):
    assert newest_identity(tmp_path) is None
    for step in ("2", "10", "9", "11.orbax-checkpoint-tmp", "²"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert steps_on_disk(tmp_path) == [2, 9, 10]
    Identity(train_config(), load_tokenizer("bytes")).write(tmp_path / "checkpoints/9")
    assert newest_identity(tmp_path) == tmp_path / "checkpoints/9"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "manifest.json"])
def test_newest_identity_passes_over_a_damaged_one(train_config, tmp_path, name):
    for step in ("2", "4"):
        Identity(train_config(), load_tokenizer("bytes")).write(tmp_path / "checkpoints" / step)
        write_manifest(tmp_path / "checkpoints" / step)
    with open(tmp_path / "checkpoints/4" / name, "a") as file:
        file.write(" x")
    assert newest_identity(tmp_path) == tmp_path / "checkpoints/2"
