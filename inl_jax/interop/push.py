"""Exported models on the Hugging Face hub."""

import shlex
from pathlib import Path

from inl_jax.checks import InputError, require
from inl_jax.console import first_line
from inl_jax.failures import MachineFailure
from inl_jax.redact import redact


def check_name(repo_id: str) -> None:
    """Checks, without the network, that a model may be pushed to a repository of this name.

    Raises:
      InputError: the name is impossible, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"push={repo_id}: {first_line(error)}; name it owner/name") from None
    require("/" in repo_id, f"push={repo_id}: has no owner; write owner/{repo_id}")
    require(
        get_token() is not None,
        f"push={repo_id}: there is no token of the hub; run hf auth login, or set HF_TOKEN",
    )


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads an exported model to the hub; returns its address.

    The repository is made unless it is there. Nothing is deleted from it.

    Args:
      folder: as `export` wrote it.
      repo_id: owner/name.
      private: whether nobody else may see it.

    Raises:
      InputError: the repository is there and public, and `private` is asked for.
      MachineFailure: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    again = shlex.join(["hf", "upload", repo_id, str(folder), *(["--private"] if private else ())])
    try:
        # None leaves the visibility to the owner's settings.
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise InputError(
                f"push={repo_id}: is public; make it private in its settings, then run: {again}"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of inl_jax")
    except InputError:
        raise
    except Exception as error:  # each layer of the client raises types of its own
        raise MachineFailure(
            f"push={repo_id}: the upload failed ({redact(first_line(error))}), and {folder} is "
            f"complete; mend that, then run: {again}"
        ) from None
    return str(address)
