"""The files of any model of the hub: in a folder, in the hub's cache, or fetched."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from soundmap.errors import MissingExtra, ModelError

TIMEOUT_S = 5.0
"""How long the hub may take to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise."""
_HTTP = ("httpx", "httpcore", "requests", "urllib3")


def repository_folder(
    name: str,
    *,
    what: str,
    extra: str,
    files: Sequence[str],
    whole: Callable[[Path], bool],
    advice: str,
) -> Path:
    """Find the files of a model.

    Parameters
    ----------
    name
        A folder, or a repository of the hub.
    what
        What the model is, for messages: "the vision-language model".
    extra
        The extra of soundmap that has what fetching needs.
    files
        Patterns of the files that are wanted, at the top of the repository. Weights that are
        pickles are not to be among them.
    whole
        Whether a folder of the cache has all that it needs; if it has, nobody is asked.
    advice
        What to do with a folder that was brought by hand: "give it with --model DIR".

    Raises
    ------
    ModelError
        It is nowhere, or cannot be reached. The message says why, and how to bring it by hand.
    MissingExtra
        huggingface_hub is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingExtra("huggingface_hub", extra, f"fetching {what}") from error
    fetch = partial(
        hub.snapshot_download, name, allow_patterns=list(files), ignore_patterns=["*/*"]
    )
    try:
        with quiet():
            try:
                held = Path(fetch(local_files_only=True))
                if whole(held):
                    return held
            except hub.errors.LocalEntryNotFoundError:
                pass
            # Asked for once and without patience: the download itself would try for half a
            # minute before it says that there is no network.
            timeout_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT_S)
            hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=timeout_s)
            return Path(fetch())
    except hub.errors.HFValidationError as error:
        raise ModelError(
            f"{what} {name} is not there: it is neither a folder nor the name of a repository"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{what} {name} is not on this machine and could not be fetched: "
            f"{reason(error, name)}. By hand: `hf download {name} --local-dir DIR` where there "
            f"is a network, bring DIR here and {advice}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub's library from warning of what is told in one line in the end."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def reason(error: Exception, repository: str) -> str:
    """Say in a few words why the hub did not give a file."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    # The library wraps the cause in an error that only says that a file is missing.
    cause = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and isinstance(
        cause.__cause__, Exception
    ):
        cause = cause.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE) and it is not in the cache"
    if isinstance(cause, errors.GatedRepoError):
        return f"{host} gives {repository} to approved accounts alone: ask there, `hf auth login`"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"{host} has no {repository} for this account (HTTP 401): try `hf auth login`"
        if isinstance(cause, errors.EntryNotFoundError):
            return f"{repository} at {host} has no such file (HTTP {status})"
        if status == 404:
            return f"{host} has no repository {repository} (HTTP 404)"
        return f"{host} answered with HTTP {status}"
    # The library's own library for HTTP is another from its version 1 on: told by name.
    kind = type(cause)
    if kind.__module__.partition(".")[0] in _HTTP or isinstance(cause, ConnectionError):
        if "Timeout" in kind.__name__:
            return f"{host} did not answer in time"
        reached = "Connect" not in kind.__name__
        what = f"the connection to {host} broke" if reached else f"{host} cannot be reached"
        return f"{what} ({_first_line(cause)})"
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return f"the disk of {constants.HF_HUB_CACHE} is full (HF_HOME chooses another place)"
    if isinstance(cause, OSError) and "onsistency check" in str(cause):
        return "it came in another size than the hub had announced: try again"
    return _first_line(cause) or kind.__name__


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split())
