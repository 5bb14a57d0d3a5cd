"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """A file, option or argument that cannot work. The message says what was wrong and what to do about it.

    `run_cifar.py` prints it as one paragraph and exits with code 2; as a library it is an ordinary ValueError.
    """
