"""The one exception that a user's mistake raises; ``main`` prints it as one line, exit code 2."""


class UserError(ValueError):
    """What is wrong, where (file or flag), what was found, and the cure, in one line."""
