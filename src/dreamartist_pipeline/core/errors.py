"""The errors that end a run in one readable message."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was expected, what came, and what to do."""


class TrainingError(RuntimeError):
    """A training that cannot go on, because nothing is learned or numbers are no longer finite."""
