"""Time and memory to read, plot and resume a run of a million rows.

    python -m benchmarks.long_metrics --rows 1000000

writes a run with the ledger of three objectives into a temporary folder, then, in a fresh process
each, reads it as a table, draws its curves as a page does, and truncates it as a resumed run does.
It prints seconds, seconds of CPU, and the peak of the resident memory, imports included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

OBJECTIVES = ("pair", "proxy", "separation")
QUANTITIES = (
    *("loss", "weight", "weighted", "gradient_embeddings", "gradient_proxies"),
    *("share_embeddings", "share_proxies"),
)


def write_run(folder: Path, *, rows: int) -> None:
    """A run with noisy curves; a row of rates every 50 steps, an evaluation every 10,000."""
    from mmljax.config import from_mapping, to_dict

    config = from_mapping(runpy.run_path("configs/quickstart.py")["get_config"]())
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    keys = ["loss", *(f"{q}/{name}" for name in OBJECTIVES for q in QUANTITIES)]
    keys += ["kept_positive/pair", "kept_negative/pair", "conflict/pair_proxy"]
    keys += ["gradient_norm/network", "learning_rate/backbone", "learning_rate/head"]
    random = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            values = random.random(len(keys), np.float32).tolist()
            row = {"step": step, "kind": "train", **dict(zip(keys, values, strict=True))}
            file.write(json.dumps(row) + "\n")
            if step % 50 == 0:
                row = {"images_per_second": 900.0, "input_wait": 0.01, "compilations": 31}
                file.write(json.dumps({"step": step, "kind": "rates", **row}) + "\n")
            if step % 10_000 == 0:
                row = {"recall@1": 0.5, "recall@10": 0.75, "map@r": 0.25}
                file.write(json.dumps({"step": step, "kind": "evaluation", **row}) + "\n")


def read(folder: Path, rows: int) -> str:
    """Read the run as a table."""
    from mmljax.runs.reader import read_runs

    return f"{len(read_runs([folder]))} rows of the table"


def draw(folder: Path, rows: int) -> str:
    """Read what a page reads, and draw its curves."""
    from mmljax.runs.plot import contribution_figure, svg_of
    from mmljax.runs.reader import read_run
    from mmljax.runs.writer import read_metrics

    evaluations = read_metrics(folder, kind="evaluation")
    figure = contribution_figure(read_run(folder))
    assert figure is not None
    return f"{len(evaluations)} evaluations, {len(svg_of(figure)) / 1e6:.1f} MB of SVG"


def resume(folder: Path, rows: int) -> str:
    """Resume the run at its middle."""
    from mmljax.runs.writer import METRICS, Reporter

    Reporter(folder, start_step=rows // 2, total_steps=rows, batch_size=1).close()
    return f"{(folder / METRICS).stat().st_size / 2**20:.0f} MiB kept"


def measured(task: Callable[[Path, int], str], folder: Path, rows: int) -> None:
    """Run a task and print its seconds and this process's peak of resident memory."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    result = task(folder, rows)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{task.__name__:<8}{seconds:7.1f} s{cpu:7.1f} s CPU{peak:7.2f} GiB   {result}", flush=True
    )


def main() -> None:
    """Write the run and measure each task in a process of its own."""
    parser = argparse.ArgumentParser(description="Time and memory of a long metrics.jsonl.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, rows=options.rows)
        size = (folder / "metrics.jsonl").stat().st_size / 2**20
        print(f"{options.rows} rows of training, {size:.0f} MiB")
        for task in (read, draw, resume):
            process = spawn.Process(target=measured, args=(task, folder, options.rows))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
