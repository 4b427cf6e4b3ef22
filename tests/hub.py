"""A Hugging Face hub of one dataset and one tokenizer that needs no network."""

from types import SimpleNamespace

import datasets
import huggingface_hub

from inl_jax.tokens.tokenizer import load_tokenizer

COMMITS = {None: "a" * 40, "main": "a" * 40, "v2": "b" * 40}


class Hub:
    """`asked` has a line for every question to the hub."""

    def __init__(self, monkeypatch, folder):
        self.commits, self.asked, self.folder = dict(COMMITS), [], folder
        self.online, self.fetched = True, ""  # fetched: a commit that is on the disk
        api = SimpleNamespace(repo_info=self.repo_info)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def repo_info(self, name, *, repo_type, revision, timeout):
        self.asked.append(f"{repo_type} {name} {revision}")
        if not self.online:
            raise ConnectionError("no route\nto the hub")
        return SimpleNamespace(sha=self.commits[revision])

    def load_dataset(self, name, config, *, split, streaming, revision):
        self.asked.append(f"rows {name} {config} {split} {revision}")
        rows = {"id": range(9), "text": [f"{revision} row {i}" for i in range(9)]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    def snapshot_download(self, name, *, revision, local_files_only=False, **_):
        if local_files_only and not self.fetched:
            raise FileNotFoundError
        if not local_files_only:
            self.asked.append(f"tokenizer {name} {revision}")
        folder = self.folder / "snapshots" / (self.fetched or revision)
        load_tokenizer("bytes").save(folder)
        return str(folder)
