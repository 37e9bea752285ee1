"""Compare the scores of two runs, query by query, with 95 % bootstrap intervals over test items.

    mmljax compare runs/a runs/b

Both must have been evaluated on the same queries. The interval does not include the variation
between training seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmljax.cli import options as shared
from mmljax.errors import UserError
from mmljax.text import differences as protocol_differences
from mmljax.text import printable, text_table

if TYPE_CHECKING:
    from mmljax.retrieval.compare import Difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax compare``."""
    shared.add_run(parser, "run_a")
    shared.add_run(parser, "run_b")
    parser.add_argument(
        "--resamples", type=shared.at_least(1), default=10_000, help="default 10000"
    )
    parser.add_argument(
        "--seed", type=shared.at_least(0), default=0, help="of the resamples; default 0"
    )
    parser.add_argument(
        "--force", action="store_true", help="compare runs whose evaluation protocols differ"
    )


def run(options: argparse.Namespace) -> int:
    """Refuse what cannot be compared, else print the table of differences."""
    from mmljax.retrieval.compare import compare
    from mmljax.retrieval.records import read_records

    a, b = read_records(options.run_a), read_records(options.run_b)
    if differing := protocol_differences(a.protocol, b.protocol):
        text = (
            f"{options.run_a} and {options.run_b} were evaluated by different protocols: "
            f"{'; '.join(differing)}"
        )
        if not options.force:
            raise UserError(f"{text}; evaluate both by one protocol, or add --force")
        print(printable(f"warning: {text}"), file=sys.stderr)
    count, differences = compare(a, b, resamples=options.resamples, seed=options.seed)
    print(printable(f"A {options.run_a}, step {a.step}"))
    print(printable(f"B {options.run_b}, step {b.step}"))
    print(_table(differences))
    print(
        f"{count} queries counted in both; intervals from {options.resamples} resamples of the "
        f"items, seed {options.seed}; they do not include the variation between training seeds"
    )
    return 0


def _table(differences: Mapping[str, Difference]) -> str:
    """In percent and points, a row per score."""
    rows = [["%", "A", "B", "B - A", "95 % interval"]]
    for key, d in differences.items():
        interval = f"{100 * d.low:+.2f} to {100 * d.high:+.2f}"
        cells = f"{100 * d.a:.2f}", f"{100 * d.b:.2f}", f"{100 * d.difference:+.2f}", interval
        rows.append([printable(key), *cells])
    return text_table(rows)
