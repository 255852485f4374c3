"""The one exception of the package: it names the thing, the reason and the next command."""


class FusionError(Exception):
    """An error a user can act on.

    Args:
        message: what went wrong, naming the thing ("me/bert-irony has no label names").
        hint: the next command or argument to type, if there is one.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message
