"""Files from the Hugging Face hub, or one clear sentence when they cannot be had."""

from pathlib import Path

from infogrowth.errors import UserError


def download(name: str, *filenames: str) -> Path:
    """Path of the first of ``filenames`` that the hub's repository ``name`` has (cached).

    Raises:
        UserError: no network, no such repository, or none of the files in it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except LocalEntryNotFoundError as error:
            raise UserError(_unreachable(name)) from error
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise UserError(
                f"{name!r} is neither a file, a folder, nor a model on the Hugging Face hub"
            ) from error
        except OSError as error:  # includes httpx/requests connection errors
            raise UserError(_unreachable(name)) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("httpx", "requests", "huggingface_hub"):
                raise UserError(_unreachable(name)) from error
            raise
    raise UserError(f"{name!r} on the Hugging Face hub has none of {', '.join(filenames)}")


def _unreachable(name: str) -> str:
    return (
        f"{name!r} is not a local path and the Hugging Face hub cannot be reached; "
        "give a local path, or `init: random` where weights are only a starting point"
    )
