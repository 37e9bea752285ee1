"""Exceptions that a command prints as one line, and the check for optional packages."""

from __future__ import annotations

import importlib.util


class UserError(ValueError):
    """A mistake of the user: what is wrong, the file or flag, what was found, and the cure.

    A command prints it as one line and exits with ``exit_code``.
    """

    exit_code = 2  # the same command would fail again


class Unreachable(UserError):
    """An address that cannot be read or written now; the same command may succeed later."""

    exit_code = 1

    @classmethod
    def of(cls, address: object, done: str, reason: str, *, more: str = "") -> Unreachable:
        """With the cure.

        Args:
          address: what cannot be reached, as the message names it.
          done: what cannot be done with it, such as ``read``.
          reason: the error.
          more: a further cure.
        """
        return cls(
            f"{address} cannot be {done} ({reason}); check the network, that the bucket exists, "
            "and that the account of this machine may use it (gcloud auth application-default "
            f"login){more}"
        )


class Preempted(Exception):
    """The run was asked to stop and saved a checkpoint; the same command resumes it."""

    EXIT_CODE = 75  # EX_TEMPFAIL: try again later

    def __init__(self, message: str, *, exit_code: int = EXIT_CODE) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # 130 after SIGINT


def require(module: str, *, extra: str, purpose: str) -> None:
    """Check that an optional package is installed, before any work is done.

    Args:
      module: the package's import name.
      extra: the extra of mmljax that installs it.
      purpose: what needs it, such as ``--config.log.wandb=True`` or ``mmljax page``.

    Raises:
      UserError: if the package is absent.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs the package {module}: pip install 'mmljax[{extra}]'")
