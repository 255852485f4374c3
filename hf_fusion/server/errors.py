"""HTTP errors of the Hub: a status, a code that the clients turn into their exceptions, and a message."""

from __future__ import annotations

from typing import Any


class HubError(Exception):
    """An HTTP error response.

    Args:
        status: HTTP status.
        message: for users; becomes ``X-Error-Message``.
        code: for clients; becomes ``X-Error-Code`` (RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo).
        headers: further headers.
        body: further members of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> None:
        message = message.encode(errors="replace").decode()  # names from clients can contain lone surrogates
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": _header_safe(message), **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **(body or {})}


def _header_safe(text: str) -> str:
    """Text for a header: one line of printable ASCII without surrounding spaces; other characters become '?'."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:500].strip()


def repo_not_found(name: str) -> HubError:
    """The same response for a missing repo and for one that the caller may not see."""
    return HubError(404, f"Repository {name} not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """The repo exists, the branch, tag or commit does not."""
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str) -> HubError:
    """Clients remember the miss under the commit, hence the header."""
    return HubError(404, f"{path} does not exist on {commit}", "EntryNotFound", {"X-Repo-Commit": commit})
