"""Errors as OpenAI's API answers them."""

from __future__ import annotations

from typing import Any

TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error"}


class ApiError(Exception):
    """A request that is refused or not finished.

    Args:
        status: of the HTTP response.
        message: names the thing, and what to do.
        code: a word for programs.
        param: the field of the request.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be answered as it is."""
    return ApiError(400, message, code, param)


__all__ = ["ApiError", "invalid"]
