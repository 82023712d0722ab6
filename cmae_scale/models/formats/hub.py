"""Folders to the Hugging Face Hub, when a user asks for it."""

from pathlib import Path

from cmae_scale.core.errors import ConfigError


def push_folder(folder: Path, *, repository: str) -> None:
    """Upload the files of `folder` to `repository` ("USER/NAME"); a new one is private.

    With the login that huggingface_hub itself finds. Raises ConfigError for what the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ImportError:
        raise ConfigError('the Hub needs another package: pip install "cmae-scale[remote]"') from None
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from cmae-scale")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{folder} is written, but the Hub did not take it as {repository} ({reason}): "
            "log in with `hf auth login` and give a USER/NAME that is yours"
        ) from None
