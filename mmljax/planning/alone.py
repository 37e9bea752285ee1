"""Compile for a TPU in a process of its own, since an error inside libtpu ends its process."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmljax.config import from_mapping, to_dict
from mmljax.errors import UserError
from mmljax.planning.counts import Counts

_CHILD = (sys.executable, "-c", "from mmljax.planning.alone import main; main()")


class Task(NamedTuple):
    """What a process compiles; it leaves what it found in the cache."""

    config: Any  # a Config; in JSON, as the parent process sends it, a dict
    counts: Counts
    topology: str
    cache: Path | str
    find_batch_size: bool


class CompilerCrashed(UserError):
    """The compiler ended its process."""


def compile_alone(task: Task, *, program: Sequence[str] = _CHILD) -> None:
    """Fill the cache with the programs of a plan; progress is shown on stderr.

    What the process refuses is not said here: whoever reads the cache next meets it again.

    Args:
      task: what to compile.
      program: command line of the process.

    Raises:
      CompilerCrashed: if a signal ended the process.
    """
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        plain = task._replace(config=to_dict(task.config), cache=str(task.cache))
        child.stdin.write(json.dumps(plain._asdict()).encode())
        child.stdin.close()
        shown = f"{task.topology}: ".encode()
        for line in child.stderr:  # of a crash, some hundred
            if line.startswith(shown):
                sys.stderr.write(line.decode(errors="replace"))
                sys.stderr.flush()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise CompilerCrashed(
            f"--topology={task.topology}: the compiler crashed ({name}), which is an error of "
            "libtpu or too little memory here; try another version of libtpu, another "
            "--config.data.batch_size, or another topology"
        )


def main() -> None:
    """The process of :func:`compile_alone`: reads a task from standard input."""
    from mmljax.planning import chips, plan, programs

    task = Task(**json.load(sys.stdin))
    config, counts = from_mapping(task.config), Counts(*task.counts)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mmljax").setLevel(logging.INFO)
    try:
        target = chips.tpu_target(task.topology)
        cache = programs.Cache(Path(task.cache))
        if task.find_batch_size:
            size = plan.find_batch_size(config, counts, target, cache=cache)
            config = plan.with_batch_size(config, size)
        plan.make_plan(config, counts, target, cache=cache)
    except UserError:
        sys.exit(2)
