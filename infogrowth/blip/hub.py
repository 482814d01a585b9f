"""Files from the Hugging Face hub, or one clear sentence when they cannot be had."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

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

    offline = not _hub_resolves()
    unreachable: Exception | None = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, local_files_only=offline))
        except LocalEntryNotFoundError as error:
            unreachable = error  # perhaps the next of the names is in the cache
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise UserError(
                f"{name!r} is neither a file, a folder, nor a model on the Hugging Face hub"
            ) from error
        except Exception as error:
            if not isinstance(error, OSError) and _module(error) not in ("httpx", "requests"):
                raise
            unreachable = error
    if unreachable is not None:
        raise UserError(_unreachable(name)) from unreachable
    raise UserError(f"{name!r} on the Hugging Face hub has none of {', '.join(filenames)}")


def _hub_resolves() -> bool:
    """Whether the hub can be asked at all: without a name server its client retries for long."""
    from huggingface_hub.constants import ENDPOINT

    if any(key.lower() in ("https_proxy", "all_proxy") for key in os.environ):
        return True  # the proxy resolves names, this machine need not
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _module(error: Exception) -> str:
    return type(error).__module__.split(".")[0]


def _unreachable(name: str) -> str:
    return (
        f"{name!r} is not a local path and the Hugging Face hub cannot be reached; "
        "give a local path, or `init: random` where weights are only a starting point"
    )
