"""Files from the Hugging Face hub, or one clear sentence when they cannot be had."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from infogrowth.errors import UserError, shorten


def download(name: str, *filenames: str) -> Path:
    """Path of the first of ``filenames`` that the hub's repository ``name`` has (cached).

    Raises:
        UserError: no network, no such repository, or none of the files in it.
    """
    from huggingface_hub import hf_hub_download

    offline = not _hub_resolves()
    problem: Exception | None = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, local_files_only=offline))
        except Exception as error:  # the hub client raises many kinds; all mean it is not there
            problem = problem or error
    raise UserError(
        f"{name!r} is not a local path, and the Hugging Face hub did not give "
        f"{' or '.join(filenames)} ({shorten(problem)}); check the name and the network, or give "
        "a local path (`random` where weights are only a starting point)"
    ) from problem


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
