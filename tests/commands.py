"""Run commands as users do: in this process, where errors are raised, or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import small_runs
from mmljax.cli.command import logging_to_stderr, parse


def run(*words: Any) -> int:
    """Run ``mmljax WORDS`` here; raises what the command line turns into a line on stderr."""
    options = parse([str(word) for word in words])
    with logging_to_stderr():
        return options.command(options)


def run_alone(*words: Any, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m mmljax WORDS`` in a process of its own, with changes of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "mmljax", *map(str, words)],
        cwd=small_runs.ROOT,
        env=small_runs.environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
