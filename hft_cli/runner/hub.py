"""Upload a published delta to the hub."""

from __future__ import annotations

from pathlib import Path

from hft_cli.errors import UserError, first_line


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload a folder to a model repository on the hub, which is made if there is none, and return its address.

    Args:
        repository: OWNER/NAME.
        public: whether a new repository is public. One that exists stays what it is.

    Raises:
        UserError: without a login, without the right to write there, or without a connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Delta by hft: {folder.name}")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"{folder} was written, but could not be uploaded to {repository}: {first_line(error).rstrip('.')}. Log in "
            "by `hf auth login`, or take a repository that you may write to; then upload the folder by "
            f"`hf upload {repository} {folder}`."
        ) from None
    return address
