"""Models in repositories of the Hugging Face hub, or of a server that speaks its language (HF_ENDPOINT).

The token is huggingface_hub's affair: HF_TOKEN, or what `hf auth login` has kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from bst_base.errors import UserError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FAILURES = (
    HTTPError,
    HFValidationError,
    OSError,
)  # what the hub answers, a bad name, no network, no token, a full disk


class RepositoryError(UserError):
    """A repository that cannot be named, reached, read or written."""


def require_id(repository: str) -> None:
    """Raise RepositoryError unless `repository` is OWNER/NAME as the hub takes it."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RepositoryError(f"{repository}: {error}") from None
    if not _ID.fullmatch(repository):
        raise RepositoryError(f"{repository}: not the id of a repository, OWNER/NAME")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload all files of a folder as one commit, making the repository where there is none; returns its address.

    Raises RepositoryError.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: as the owner has it
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except _FAILURES as error:
        raise RepositoryError(
            f"{repository}: not uploaded: {_line(error)}; {folder} is whole: upload it with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return f"{api.endpoint}/{repository}"


def fetched(model: str, revision: str | None = None) -> Path:
    """The directory of a model: a directory as it is; else that of a repository, downloaded into the hub's cache.

    Raises RepositoryError.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise RepositoryError(f"--revision {revision} is of a repository, and {model} is a directory")
        return folder
    if not _ID.fullmatch(model):
        raise RepositoryError(f"{model}: no such directory, and not the id of a repository, OWNER/NAME")
    try:
        return Path(snapshot_download(model, revision=revision))
    except _FAILURES as error:
        raise RepositoryError(
            f"{model}: no such directory, and not downloaded as a repository: {_line(error)}"
        ) from None


def _line(error: Exception) -> str:
    """What went wrong, without the advice on several lines that the library adds."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
