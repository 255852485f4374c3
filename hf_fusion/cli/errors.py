"""Turns any exception into an error message with a hint: what went wrong, and the next command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, refusal, unwritable
from hf_fusion.extras import missing_library

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit codes: for errors, for wrong arguments, for Ctrl+C, and for a reader of the output that has exited."""


class UsageError(FusionError):
    """The arguments are wrong, whatever files and models are like."""


@contextmanager
def checking_arguments(hint: str | None = None) -> Iterator[None]:
    """Turns errors of checks that only read arguments into a `UsageError`.

    Args:
        hint: for errors that have none.
    """
    try:
        yield
    except FusionError as error:
        raise UsageError(error.message, error.hint or hint) from error


def explain(error: Exception, command: str) -> FusionError:
    """The error to print for an exception in `command`."""
    if isinstance(error, FusionError):
        error.hint = error.hint or f"hf-fusion {command} --help"
        return error
    if refusal(error) is not None:
        return unwritable(getattr(error, "filename", None) or "a file", error)
    for kind in type(error).__mro__:  # the most specific first
        if kind.__name__ in _EXPLANATIONS:
            return _EXPLANATIONS[kind.__name__](error, command)
    return FusionError(
        f"unexpected {type(error).__name__}: {_first_line(error)}",
        f"show where it happened: hf-fusion {command} … --debug",
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error)[:10_000].splitlines() if line.strip()), type(error).__name__)


def _repo(error: Exception) -> str:
    return getattr(error, "repo_id", None) or "that repo"


def _no_repo(error: Exception, command: str) -> FusionError:
    return FusionError(
        f"the Hub has no {_repo(error)}, or it is private", "check the id; a private repo needs: hf auth login"
    )


def _gated(error: Exception, command: str) -> FusionError:
    return FusionError(f"{_repo(error)} is gated", "accept the terms on its page on the Hub, then: hf auth login")


def _no_revision(error: Exception, command: str) -> FusionError:
    return FusionError(
        f"{_repo(error)} has no such revision", "check the part after @, or omit it for the newest commit"
    )


def _no_token(error: Exception, command: str) -> FusionError:
    return FusionError("you are not logged in to the Hub", "hf auth login, or set HF_TOKEN")


def _hub_refused(error: HfHubHTTPError, command: str) -> FusionError:
    if getattr(error.response, "status_code", None) in (401, 403):
        return FusionError(f"the Hub refused the request: {_first_line(error)}", "hf auth login, or set HF_TOKEN")
    return FusionError(f"the Hub returned an error: {_first_line(error)}", "try again later")


def _unreachable(error: Exception, command: str) -> FusionError:
    from huggingface_hub.constants import ENDPOINT

    return FusionError(
        f"the Hub at {ENDPOINT} cannot be reached ({_first_line(error)})",
        "check HF_ENDPOINT and the network, or run a local Hub: hf-fusion hub serve hub",
    )


def _missing_module(error: ImportError, command: str) -> FusionError:
    if library := missing_library(error):
        return FusionError(f"{command} needs {library}, which is not installed", f"pip install {library}")
    return FusionError(
        f"an import failed: {_first_line(error)}", f"show where it happened: hf-fusion {command} … --debug"
    )


def _system(error: OSError, command: str) -> FusionError:
    if error.filename and error.strerror:
        return FusionError(f"{error.filename}: {error.strerror}", f"hf-fusion {command} --help")
    return FusionError(_first_line(error), f"hf-fusion {command} --help")


def _bad_value(error: Exception, command: str) -> FusionError:
    return FusionError(str(error).strip(), f"hf-fusion {command} --help")


# exception class, by name so that no library has to be imported → error to print
_EXPLANATIONS: dict[str, Callable[[Any, str], FusionError]] = {
    "GatedRepoError": _gated,
    "RepositoryNotFoundError": _no_repo,
    "RevisionNotFoundError": _no_revision,
    "LocalTokenNotFoundError": _no_token,
    "OfflineModeIsEnabled": _unreachable,
    "HfHubHTTPError": _hub_refused,
    "TransportError": _unreachable,
    "ImportError": _missing_module,
    "ValueError": _bad_value,
    "OSError": _system,
}
