"""The error that a user can mend: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Says what is wrong, where, and what to do about it."""


class NotDone(Exception):
    """Something was not checked, because it is not there or there is no way to; says why, and what to do."""


def nearest(word: str, words: Iterable[str]) -> str:
    """``, did you mean 'merge'?`` for the most similar of some words, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def at_least(minimum: float, **values: float) -> None:
    """Refuse flags below a minimum.

    Raises:
        UserError: names the first of them.
    """
    for name, value in values.items():
        if not value >= minimum:
            raise UserError(f"--{name} {value}: it must be {minimum} or more")


def numbers(name: str, values: object) -> list[float]:
    """A flag's numbers, one or several, with commas or without.

    Raises:
        UserError: one of them is none, or not finite.
    """
    items = values.split(",") if isinstance(values, str) else values if isinstance(values, tuple | list) else [values]
    try:
        found = [float(item) for item in items]
    except (TypeError, ValueError):
        found = []
    if not found or not all(math.isfinite(number) for number in found):
        raise UserError(f"--{name} {values}: it must be numbers with commas between them")
    return found


@contextmanager
def naming(file: Any) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one line that names it.

    Raises:
        UserError: names the file and the first cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"{file} cannot be read ({' '.join(str(cause).split())[:200] or type(cause).__name__})"
        ) from error
