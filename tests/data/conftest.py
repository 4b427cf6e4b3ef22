import pytest

from inl_jax.config import DataConfig
from inl_jax.data.corpus import prepare


@pytest.fixture
def make(tmp_path):
    """`make(*paths, **fields)` prepares bytes, half held out, with a cache in `tmp_path`."""

    def make(*paths, using=None, **fields):
        defaults = {"tokenizer": "bytes", "validation_fraction": 0.5}
        data = DataConfig(
            paths=tuple(map(str, paths)), cache_dir=str(tmp_path / "cache"), **defaults | fields
        )
        return prepare(data, tokenizer=using)

    return make
