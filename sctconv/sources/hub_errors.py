"""What can go wrong with the Hub, each in one line that names the repository, the cause and the way out."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from sctconv.formats.errors import CheckpointError, CorruptShardError

LOGIN: Final = "run `hf auth login` or set HF_TOKEN"
MAKE_ROOM: Final = "free some, set HF_HOME to a directory on another disk, or use --low-disk"
NOT_SOUND: Final = "try another revision, as ORG/NAME@REVISION, or tell the repository's authors"


class HubError(CheckpointError):
    """The Hub lacks or refuses what was asked for, or it cannot be stored."""


class HubUnreachableError(HubError):
    """There is no connection to the Hub, or it does not answer as it should, and the cache is not enough."""


@contextlib.contextmanager
def explained(repo: str, what: str) -> Iterator[None]:
    """Makes one line of whatever comes out of huggingface_hub, which lets through what the libraries under it raise."""
    try:
        yield
    except Exception as error:
        raise _explain(error, repo, what) from error


def _explain(error: BaseException, repo: str, what: str) -> CheckpointError:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # it only says that the cache did not help either
    text = " ".join(str(error).split())[:160]
    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case GatedRepoError():
            return HubError(f"{repo}: gated; accept its licence at {page}, then {LOGIN}")
        case RepositoryNotFoundError():
            return HubError(f"{repo}: no such model there, or a private one; check the name, or {LOGIN}")
        case RevisionNotFoundError() | RemoteEntryNotFoundError():
            return HubError(f"{repo}: has no {what}; see what there is at {page}/tree/main")
        case HFValidationError():
            return HubError(f"{repo}: not a name that the Hub allows; give org/name ({text})")
        case SafetensorsParsingError():
            return CorruptShardError(f"{repo}: {what} is not that of a safetensors file; {NOT_SOUND} ({text})")
        case OfflineModeIsEnabled():
            return HubUnreachableError(f"{repo}: HF_HUB_OFFLINE is set, and {what} is not in the cache; unset it")
        case HfHubHTTPError():
            return _explain_status(error, repo, what)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubError(f"{repo}: no space left in {constants.HF_HUB_CACHE} for {what}; {MAKE_ROOM}")
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return HubError(f"{repo}: {what} cannot be stored ({text}); set HF_HOME to a directory that can be written")
    return HubUnreachableError(
        f"{repo}: cannot get {what} from {constants.ENDPOINT} ({type(error).__name__}: {text}), and it is not in the "
        "cache; check the network, proxies and HF_ENDPOINT, and run the command again"
    )


def _explain_status(error: HfHubHTTPError, repo: str, what: str) -> HubError:
    status = error.response.status_code
    if status >= 500 or status in (408, 429):
        return HubUnreachableError(f"{repo}: {constants.ENDPOINT} answers {status} for {what}; try again later")
    reason = " ".join((error.server_message or "no reason given").split())[:160]
    return HubError(f"{repo}: {constants.ENDPOINT} refuses {what} ({status}: {reason}); check the token: {LOGIN}")
