"""``python -m mmljax.cli.compare A B``: whether B's scores differ from A's, query by query.

Both are directories of runs (or files in them) that were evaluated on the same queries. What is
shown is the mean difference over the queries, and an interval that it would stay in, were the test
items drawn again: the bootstrap over *items*. Items, not queries, are drawn with replacement, as
the queries of an item share their relevant gallery images and are found or missed together; drawn
one by one they would pass for more evidence than they are.

The interval says nothing of training: another seed may move a score by more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmljax.errors import UserError
from mmljax.retrieval.compare import Differences, compare
from mmljax.retrieval.records import read_records
from mmljax.text import differences as protocol_differences


def table(differences: Differences) -> str:
    """In percent and points as aligned plain text, a row per score."""
    rows = [["%", "A", "B", "B - A", "95 % interval"]]
    for key, d in differences.items():
        interval = f"{100 * d.low:+.2f} to {100 * d.high:+.2f}"
        cells = f"{100 * d.a:.2f}", f"{100 * d.b:.2f}", f"{100 * d.difference:+.2f}", interval
        rows.append([key, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read both, refuse what cannot be compared, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m mmljax.cli.compare",
        description="Differences of two runs' scores, query by query, with bootstrap intervals "
        "over the test items.",
    )
    parser.add_argument("a", metavar="A", type=Path, help="directory of a run, or its results.json")
    parser.add_argument("b", metavar="B", type=Path, help="the same of another run")
    parser.add_argument("--resamples", type=int, default=10_000, help="default 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples; default 0")
    parser.add_argument(
        "--force", action="store_true", help="compare what was evaluated by different protocols"
    )
    options = parser.parse_args(arguments)
    if options.resamples < 1 or options.seed < 0:
        parser.error("--resamples must be at least 1 and --seed at least 0")
    a, b = read_records(options.a), read_records(options.b)
    if differing := protocol_differences(a.protocol, b.protocol):
        text = f"{options.a} and {options.b} were evaluated differently: {'; '.join(differing)}"
        if not options.force:
            raise UserError(f"{text}; evaluate both alike, or ask for it by --force")
        print(f"warning: {text}", file=sys.stderr)
    count, differences = compare(a, b, resamples=options.resamples, seed=options.seed)
    print(f"A {options.a}, step {a.step}\nB {options.b}, step {b.step}")
    print(table(differences))
    print(
        f"{count} queries counted in both; intervals from {options.resamples} resamples of the "
        f"items, seed {options.seed}; what another training seed would change is not in them"
    )


def run() -> None:
    """A user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"mmljax: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
