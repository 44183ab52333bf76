"""Uploading a converted directory to the hub. The token is the environment's or the login's, and stays there."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from blip2nb.errors import RequestError

log = logging.getLogger("blip2nb")


def find_token(repository: str) -> str:
    """The token to upload with, once the repository's name is a valid one.

    Raises:
        RequestError: it is not, or there is no token.
    """
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1 and all(repository.split("/"))
    except HFValidationError:
        valid = False
    if not valid:
        raise RequestError(f"--push-to-hub should name a repository such as user/blip2-opt-2.7b, found {repository!r}.")
    token = get_token()
    if token is None:
        raise RequestError(
            "--push-to-hub needs a token, and none was found. "
            "Log in with `hf auth login` or set HF_TOKEN in the environment."
        )
    return token


def upload(folder: Path, repository: str, token: str | None) -> None:
    """Create the repository if need be and upload the directory as one commit."""
    hub = HfApi(token=token)
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted from LAVIS with blip2nb")
    log.info("uploaded to %s", repository)
