"""The error that a user can mend: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Says what is wrong, where, and what to do about it."""


class NotDone(Exception):
    """Something was not checked, because it is not there or there is no way to; says why, and what to do."""


def nearest(word: str, words: Iterable[str]) -> str:
    """``, did you mean 'merge'?`` for the most similar of some words, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
