"""Records the ledger and the throughput of the training loop, and warns of slow input."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax

from mmljax.errors import UserError
from mmljax.losses.ledger import Scalars
from mmljax.mesh import total
from mmljax.runs.throughput import Compilations, InputWait
from mmljax.runs.writer import Reporter
from mmljax.types import Batch

FIRST_STEPS = 2  # may compile: the first on the initial state, the second on the output of the step
WINDOW = 10.0  # seconds; the input wait is judged over at least this long

SKIPPED = "skipped_images"
"""Of a row: images of the step's batch that could not be decoded, and were replaced."""

_log = logging.getLogger(__name__)


class Recorder:
    """Keeps scalars on the device and fetches them in blocks, so that no step waits for them."""

    def __init__(
        self,
        reporter: Reporter,
        schedules: Mapping[str, optax.Schedule],
        *,
        input_wait_warning: float,
        skipped: dict[int, int] | None = None,
    ) -> None:
        """Start the clocks.

        Args:
          reporter: receives the rows.
          schedules: learning rate of each optimiser group; added to the rows.
          input_wait_warning: fraction of the time waiting for input above which a warning is
            logged.
          skipped: by the steps before a batch, how many of its images this process replaced; their
            sum over the processes is the rows' :data:`SKIPPED`. None: the rows have no such entry.
        """
        self._skipped = skipped
        self._reporter = reporter
        self._schedules = schedules
        self._input_wait_warning = input_wait_warning
        self._rows: list[tuple[int, Scalars]] = []
        self._steps = 0
        self._wait, self._compilations = InputWait(), Compilations()
        self._waited = self._seconds = 0.0  # since the last judgement of the input
        self._starved = self._recompiled = False
        self.restart_clock()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch and measure the wait for it."""
        batch = self._wait.next(batches)
        if self._steps == 0:
            self.restart_clock()
        return batch

    def add(self, step: int, scalars: Scalars) -> None:
        """Keep the scalars of a step that was dispatched to the devices."""
        self._rows.append((step, scalars))
        self._steps += 1
        self._wait.step(next(iter(scalars.values())))

    def flush(self) -> None:
        """Write the rows since the last flush, and the throughput.

        Raises:
          UserError: at the first scalar that is not finite.
        """
        counts = self._skipped_of([step for step, _ in self._rows])
        for (step, scalars), count in zip(jax.device_get(self._rows), counts, strict=True):
            row = {name: float(value) for name, value in scalars.items()}
            row |= {} if count is None else {SKIPPED: count}
            for group, schedule in self._schedules.items():
                row[f"learning_rate/{group}"] = float(schedule(step - 1))
            self._reporter.train(step, row)
            if not np.all(np.isfinite(list(row.values()))):
                raise UserError(
                    f"{describe_broken(row)} at step {step}; the last checkpoint is kept: lower "
                    "--config.optimizer.*.learning_rate or set --config.optimizer.clip_norm"
                )
        seconds = time.perf_counter() - self._since
        waited = self._wait.seconds - self._waited_before
        self._reporter.progress(
            seconds=seconds,
            steps=len(self._rows),
            waited=waited,
            compilations=self._compilations.count,
        )
        self._judge_input(waited=waited, seconds=seconds)
        self._judge_compilations()
        self._rows = []
        self.restart_clock()

    def restart_clock(self, *, compiles: bool = False) -> None:
        """Exclude the time so far from the throughput: start-up, evaluations, saves.

        Args:
          compiles: whether the next steps may compile, as the first ones may.
        """
        if compiles:
            self._steps = 0
        self._since = time.perf_counter()
        self._waited_before = self._wait.seconds
        self._compiled_before = self._compilations.count
        self._settled = self._steps >= FIRST_STEPS

    def close(self) -> None:
        """Stop measuring steps and compilations."""
        self._wait.close()
        self._compilations.close()

    def _skipped_of(self, steps: list[int]) -> list[int] | list[None]:
        """How many images were replaced in the batches of some steps, in all processes."""
        if self._skipped is None:
            return [None] * len(steps)
        counts: list[int] = total(
            np.array([self._skipped.pop(step - 1, 0) for step in steps], np.int32)
        ).tolist()
        return counts

    def _judge_input(self, *, waited: float, seconds: float) -> None:
        """Warn when the input becomes slow, judged over at least ``WINDOW`` seconds."""
        self._waited += waited
        self._seconds += seconds
        if self._seconds < WINDOW:
            return
        share = self._waited / self._seconds
        self._waited = self._seconds = 0.0
        starved = share > self._input_wait_warning
        if starved and not self._starved:
            _log.warning(
                "the devices wait for input %.0f%% of the time, more than "
                "--config.log.input_wait_warning=%g: raise --config.data.threads (0: one per core) "
                "or --config.data.prefetch; store the images near --config.data.resize_size, which "
                "decode faster; or hold them as arrays (--config.data.source='arrays')",
                100 * share,
                self._input_wait_warning,
            )
        self._starved = starved

    def _judge_compilations(self) -> None:
        """Warn when the step is compiled again."""
        more = self._compilations.count - self._compiled_before
        recompiled = self._settled and more > 0
        if recompiled and not self._recompiled:
            _log.warning(
                "%d programs compiled after the first %d steps, the last of them %s: a shape or a "
                "dtype changes between steps; JAX_EXPLAIN_CACHE_MISSES=1 says which",
                more,
                FIRST_STEPS,
                self._compilations.last,
            )
        self._recompiled = recompiled


def describe_broken(row: Mapping[str, float]) -> str:
    """The objective whose loss or gradient is not finite in a row of the ledger, with its entries.

    If every objective is finite, the names of the entries that are not.
    """
    broken = [name for name, value in row.items() if not np.isfinite(value)]
    for kind in ("loss", "gradient_embeddings", "gradient_proxies"):
        blamed = [name.split("/")[1] for name in broken if name.startswith(f"{kind}/")]
        if blamed:
            entries = [
                f"{name.split('/')[0]} {value:.4g}"
                for name, value in row.items()
                if name.endswith(f"/{blamed[0]}")
            ]
            return f"objective {blamed[0]} not finite ({', '.join(entries)})"
    return f"{', '.join(broken)} not finite"
