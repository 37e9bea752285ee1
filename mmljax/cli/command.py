"""The parser, the logging and the exit codes of every verb.

A verb is a module of this package with a docstring (its ``--help``, with an example),
``add_arguments(parser)`` and ``run(options) -> exit code``. Heavy imports are inside ``run``, so
that ``--help`` is immediate.

=========  ===============================================================
exit code  meaning
=========  ===============================================================
0          success
1          an address cannot be reached; an exported network does not pass its check
2          wrong arguments, config or files; a failed check of ``doctor``; a plan that does not fit
75         training received SIGTERM and has saved a checkpoint
130        interrupted (Ctrl-C); training has saved a checkpoint
=========  ===============================================================
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from mmljax.allocator import keep_freed_memory
from mmljax.cli.options import fetch_runs
from mmljax.errors import Preempted, UserError
from mmljax.text import nearest, one_line, printable

VERBS = (
    *("train", "doctor", "plan", "evaluate", "features", "sweep", "interpolate", "embed", "search"),
    *("threshold", "demo", "export", "inspect", "compare", "page", "atlas", "prepare"),
)

_LONGEST_WORD = 240  # characters of a path in an error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; an error is one line on stderr.

    Args:
      arguments: a verb and its arguments; those of the process if None.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        keep_freed_memory()
        with logging_to_stderr():
            fetch_runs(options)
            return options.command(options)
    except UserError as error:
        return _fail(f"error: {one_line(error, limit=10_000)}", error.exit_code)
    except Preempted as notice:
        return _fail(f"{notice}; the same command resumes the run", notice.exit_code)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; run the same command again", 130)
    except BrokenPipeError:  # the reader of a pipe has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a path that is too long, not accessible, ...
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename)
        return _fail(f"error: {name}: {error.strerror}; check the path and your access to it", 2)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; ``command(options)`` runs its verb.

    ``--config.a.b=value`` and ``--config.a.b value`` are collected as ``a.b=value`` in
    ``overrides``, for the verbs that take ``--config``.

    Raises:
      UserError: on an unknown verb or flag, with the nearest name, or a wrong value.
    """
    parser = _Parser(
        prog="mmljax",
        description="Train and use image-retrieval embeddings with several metric-learning "
        "objectives.",
        epilog="example: mmljax train --config quickstart; mmljax VERB --help has one per verb",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = importlib.import_module(f"mmljax.cli.{name}")
        text = verb.__doc__ or ""
        subparser = verbs.add_parser(
            name,
            help=text.partition("\n")[0].rstrip(".").replace("%", "%%"),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(subparser)
        subparser.set_defaults(command=verb.run)
    words, overrides = _take_overrides(arguments)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        raise UserError(f"verb {words[0]!r} is unknown; {nearest(words[0], VERBS)}")
    if words and words[0] in VERBS:
        _check_flags(verbs.choices[words[0]], words[1:], overrides)
    options = parser.parse_args(words)
    options.overrides = overrides
    return options


def _take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without overrides of the config, and the overrides as ``a.b=value``."""
    words, overrides = [], []
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            words += [word, *rest]
        elif word.startswith("--config."):
            name, equals, value = word.removeprefix("--config.").partition("=")
            value = value if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
            overrides.append(f"{name}={value}")
        else:
            words.append(word)
    return words, overrides


def _check_flags(
    parser: argparse.ArgumentParser, words: Sequence[str], overrides: Sequence[str]
) -> None:
    known = [flag for action in parser._actions for flag in action.option_strings]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if "--config" not in known:
        flags += ["--config." + override.partition("=")[0] for override in overrides]
    for flag in flags:
        if flag == "--":
            return
        if flag not in known:
            long = [name for name in known if name.startswith("--")]
            raise UserError(f"{flag} is unknown; {nearest(flag, long)}; see {parser.prog} --help")


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Write the package's log to stderr, and silence what other libraries write there."""
    from absl import logging as absl_logging

    # Orbax logs every file that it writes, and the traceback of an error before raising it.
    absl_logging.set_verbosity(absl_logging.FATAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow only decodes images here
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # Orbax raises the first failed write of a checkpoint; asyncio would log each of the others.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    own = logging.getLogger("mmljax")
    before = own.level, own.propagate, threading.excepthook, sys.unraisablehook
    own.setLevel(logging.INFO)
    own.propagate = False
    own.addHandler(handler)
    threading.excepthook, sys.unraisablehook = _thread_failed, _callback_failed
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.level, own.propagate, threading.excepthook, sys.unraisablehook = before


class _Formatter(logging.Formatter):
    """Escapes control characters, which names of files may hold; lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Print a thread's error, except orbax's, which the thread that waits for it raises again."""
    if not type(failed.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failed)


def _callback_failed(failed: sys.UnraisableHookArgs) -> None:
    """Print a callback's error, except those that follow a failed read of a checkpoint."""
    if "Event loop is closed" not in str(failed.exc_value):
        sys.__unraisablehook__(failed)


def _fail(message: str, code: int) -> int:
    shorter = re.sub(
        rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:150]}...{word[0][-40:]}", message
    )
    print(f"mmljax: {printable(shorter)}", file=sys.stderr)
    return code
