from types import SimpleNamespace

import huggingface_hub
import pytest

from inl_jax.config import InputError
from inl_jax.failures import MachineFailure
from inl_jax.interop.push import check_name, push

TOKEN = "hf_" + "a1B2" * 8


class Api:
    """Stands for the hub: `asked` has a line for every request."""

    def __init__(self, monkeypatch, *, private=True, error=None):
        self.asked, self.private, self.error = [], private, error
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def create_repo(self, name, *, private, exist_ok):
        self.asked.append(f"make {name} private={private} exist_ok={exist_ok}")
        return f"https://hub/{name}"

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.asked.append(f"upload {folder_path} to {repo_id}")


@pytest.mark.parametrize("private, asked", [(False, None), (True, True)])
def test_push_makes_the_repository_and_uploads_the_folder(monkeypatch, tmp_path, private, asked):
    api = Api(monkeypatch)
    assert push(tmp_path, "me/tiny", private=private) == "https://hub/me/tiny"
    assert api.asked == [
        f"make me/tiny private={asked} exist_ok=True",
        f"upload {tmp_path} to me/tiny",
    ]


def test_nothing_private_is_pushed_to_a_public_repository(monkeypatch, tmp_path):
    api = Api(monkeypatch, private=False)
    with pytest.raises(InputError, match="push=me/tiny: is public"):
        push(tmp_path, "me/tiny", private=True)
    assert len(api.asked) == 1


def test_failed_upload_is_one_line_without_the_token(monkeypatch, tmp_path):
    Api(monkeypatch, error=ConnectionError(f"no route with {TOKEN}\nto the hub"))
    with pytest.raises(MachineFailure) as failed:
        push(tmp_path, "me/tiny", private=True)
    line = str(failed.value)
    assert line.endswith(f"then run: hf upload me/tiny {tmp_path} --private") and "no route" in line
    assert TOKEN not in line and "\n" not in line


@pytest.mark.parametrize(
    "name, message",
    [
        ("tiny", "write owner/tiny"),
        ("a/b/c", "name it owner/name"),
        ("me/a--b", "name it owner/name"),
        ("me/-a", "name it owner/name"),
        ("", "name it owner/name"),
    ],
)
def test_impossible_names_are_refused(monkeypatch, name, message):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_name("me/tiny")
    with pytest.raises(InputError, match=message):
        check_name(name)


def test_missing_token_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login, or set HF_TOKEN"):
        check_name("me/tiny")
