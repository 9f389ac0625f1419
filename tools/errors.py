"""The error that a user can mend: printed as one line, without a traceback."""


class UserError(Exception):
    """Says what is wrong, where, and what to do about it."""
