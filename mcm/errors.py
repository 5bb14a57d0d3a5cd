"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """A file, option or argument that cannot work: the message says what was wrong and what to do.

    The scripts print it as one paragraph and exit with code 2; for a caller of the library it is an
    ordinary ValueError.
    """
