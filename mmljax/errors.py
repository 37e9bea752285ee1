"""The one exception that a user's mistake raises; ``main`` prints it as one line, exit code 2."""


class UserError(ValueError):
    """What is wrong, where (file or flag), what was found, and the cure, in one line."""


class Preempted(Exception):
    """The run was asked to make room, has saved itself, and goes on by the same command."""

    EXIT_CODE = 75  # the system's "try again later"
