"""Models in repositories of the Hugging Face hub, or of a server with the same API (HF_ENDPOINT).

huggingface_hub reads the access token: from HF_TOKEN, or as stored by `hf auth login`.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from bst_base.errors import UserError
from bst_dist.hub.digests import DIGESTS, read_digests

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of the files that transformers loads weights from."""
_FAILURES = (
    HTTPError,
    HFValidationError,
    OSError,
)  # an error from the hub, a bad name, no network, no token, a full disk


class RepositoryError(UserError):
    """A repository has no valid name, or cannot be reached, read or written."""


def require_id(repository: str) -> None:
    """Raise RepositoryError unless `repository` is OWNER/NAME in the form that the hub accepts."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RepositoryError(f"{repository}: {error}") from None
    if not _ID.fullmatch(repository):
        raise RepositoryError(f"{repository}: not the id of a repository, OWNER/NAME")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an export as one commit, and create the repository if it does not exist. Return its address.

    The commit also removes files of earlier exports that this one does not have, above all weights, which transformers
    might load in place of the new ones. Other files that users have added stay. `private`: refuse a repository that is
    public. Raise RepositoryError if it fails.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: the owner's default
        if private and not api.repo_info(repository).private:
            raise RepositoryError(
                f"{repository}: not uploaded: it exists, and is public: make it private in its settings, name another "
                f"one, or leave out --private; {folder} is whole"
            )
        old = [glob.escape(name) for name in _exported(api, repository) if not (folder / name).exists()]
        message = f"Upload {folder.name}"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=old)
    except _FAILURES as error:
        raise RepositoryError(
            f"{repository}: not uploaded: {_line(error)}; {folder} is whole: upload it with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return f"{api.endpoint}/{repository}"


def _exported(api: HfApi, repository: str) -> list[str]:
    """Return the files in a repository that exports have written: those in its list of digests, and all weights."""
    there = api.list_repo_files(repository)
    listed = read_digests(Path(api.hf_hub_download(repository, DIGESTS))) if DIGESTS in there else {}
    return [name for name in there if name in listed or _WEIGHTS.fullmatch(name)]


def fetched(model: str, revision: str | None = None) -> Path:
    """Return the directory of a model: `model` if it is a directory, else the repository's, downloaded into the cache.

    Raise RepositoryError if it fails.
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
    """Return the first line of an error, without the advice that the library adds."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
