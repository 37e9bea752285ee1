"""Progress of a run: a bar in a terminal, lines elsewhere (log files, batch jobs)."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any, TextIO


class Progress:
    """Shows steps, facts and the remaining time, estimated from the time since construction."""

    def __init__(self, *, start_step: int, total_steps: int, stream: TextIO) -> None:
        """Start at a step.

        Args:
          start_step: the restored step, or 0.
          total_steps: last step of the run.
          stream: shows a bar if it is a terminal, else a line per call.
        """
        self._first = self._step = start_step
        self._total = total_steps
        self._stream = stream
        self._bar = _make_bar(start_step, total_steps, stream) if stream.isatty() else None
        self._start = time.monotonic()

    def show(self, step: int, facts: Mapping[str, str]) -> None:
        """Show that the run is at ``step``, with these facts in order."""
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._bar is None:
            per_step = (time.monotonic() - self._start) / max(step - self._first, 1)
            left = datetime.timedelta(seconds=round(per_step * (self._total - step)))
            self.say(step, [*(f"{name} {value}" for name, value in facts.items()), f"eta {left}"])

    def say(self, step: int, facts: list[str]) -> None:
        """Print a separate line; a bar stays below it."""
        line = "  ".join([f"step {step}/{self._total}", *facts])
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar on the screen; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()


def _make_bar(step: int, total_steps: int, stream: TextIO) -> Any:
    from tqdm import tqdm

    return tqdm(
        initial=step,
        total=total_steps,
        unit="step",
        file=stream,
        dynamic_ncols=True,
        mininterval=0,  # redrawn at every call; calls are rare
        miniters=1,
    )
