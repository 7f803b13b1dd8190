"""The error that a user of the model room can cause."""

from __future__ import annotations


class ModelError(Exception):
    """One sentence that says what is wrong and what to do.

    exit_code is what the command line ends with: 1 another try cannot help, 2 wrong usage or configuration,
    75 another try may help (sysexits.h, EX_TEMPFAIL). told_by_main: whether another process of the same training says
    it, so that this one need not.
    """

    told_by_main = False

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
