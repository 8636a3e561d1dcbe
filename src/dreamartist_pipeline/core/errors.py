"""The one exception for input that a user can correct."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was expected, what came, and what to do."""
