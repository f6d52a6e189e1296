"""A merged folder onto the Hugging Face hub, by `huggingface_hub`: token and endpoint are those it finds (HF_TOKEN,
HF_ENDPOINT, `hf auth login`). Nothing is moved or removed here, whatever becomes of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi


def prepare_upload(repository: str, private: bool) -> None:
    """Make the repository if it is not there: asked before the work, so that a wrong name or token is found first.

    Raises:
        ConnectionError: the hub refuses it or does not answer.
    """
    _ask(repository, HfApi().create_repo, repo_id=repository, private=private, exist_ok=True)


def upload(folder: Path, repository: str) -> str:
    """Send every file of the folder in one commit; returns its address. ConnectionError as above, which says what sends
    the folder later."""
    message = "Merged checkpoint"
    try:
        commit = _ask(
            repository, HfApi().upload_folder, repo_id=repository, folder_path=str(folder), commit_message=message
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. The merged model is whole in {folder}; to send it later: "
            f"{shlex.join(['hf', 'upload', repository, str(folder)])}"
        ) from error
    return commit.commit_url


def _ask(repository: str, request: Callable, **arguments: Any) -> Any:
    try:
        return request(**arguments)
    except Exception as error:  # the library's own, its HTTP client's and the system's have no common class
        raise ConnectionError(
            f"--hf_upload_path: expected to write to {repository} on {HfApi().endpoint}, got {type(error).__name__}: "
            f"{' '.join(str(error).split())}; log in with `hf auth login` or HF_TOKEN, or leave the flag out"
        ) from error
