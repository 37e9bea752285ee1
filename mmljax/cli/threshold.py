"""Choose a similarity threshold for a wanted false-match rate, and measure it on test classes.

    mmljax threshold RUN --false-match-rate 0.001
    mmljax search RUN --threshold RUN/threshold.json --embeddings photos.parquet --images query.jpg

Two images match if they show one item. The threshold is chosen on items that are not tested: with
--chosen-on validation on a share of the run's test items, with --chosen-on train on its training
items, which the network has learnt to separate, so that other items are confused more often. The
error rates on the remaining test items have 95 % bootstrap intervals over items. The result is
threshold.json with a plot in RUN, or --output.
"""

from __future__ import annotations

import argparse
from typing import Any

from mmljax.cli import options as shared
from mmljax.errors import require
from mmljax.text import printable, text_table

_RATES = {  # of the report: the name in the table
    "false_match_rate": "false matches, of pairs of two items",
    "false_non_match_rate": "false non-matches, of pairs of one item",
    "false_positive_identification_rate": "answers to queries whose item the gallery lacks",
    "false_negative_identification_rate": "no or a wrong first answer to the other queries",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax threshold``."""
    shared.add_run(parser)
    shared.add_step(parser)
    shared.add_dims(parser)
    parser.add_argument(
        "--false-match-rate",
        type=shared.share,
        default=0.001,
        metavar="RATE",
        help="wanted, of pairs of images of two items; default 0.001",
    )
    parser.add_argument(
        "--chosen-on",
        choices=("validation", "train"),
        default="validation",
        help="items on which the threshold is chosen; default validation",
    )
    parser.add_argument(
        "--validation-share",
        type=shared.share,
        default=0.5,
        metavar="SHARE",
        help="of the test items, for --chosen-on validation; default 0.5",
    )
    parser.add_argument("--resamples", type=shared.at_least(1), default=2000, help="default 2000")
    parser.add_argument(
        "--seed",
        type=shared.at_least(0),
        default=0,
        help="of the validation items and the resamples; default 0",
    )
    parser.add_argument(
        "--output", type=shared.local_path, help="JSON file; default: threshold.json in RUN"
    )
    shared.add_directory(parser)


def run(options: argparse.Namespace) -> int:
    """Choose and measure the threshold of the run that the options name."""
    require("matplotlib", extra="plot", purpose="mmljax threshold")
    from mmljax.inference import embed, threshold
    from mmljax.runs.plot import threshold_figure, write_figure
    from mmljax.runs.reader import load_run_data

    dataset = load_run_data(options.run, directory=options.directory)[1]
    trained = embed.load(options.run, step=options.step, dims=options.dims)
    images = threshold.embed_sets(
        trained,
        dataset,
        chosen_on=options.chosen_on,
        validation_share=options.validation_share,
        seed=options.seed,
    )
    report = threshold.threshold_report(
        *images,
        false_match_rate=options.false_match_rate,
        resamples=options.resamples,
        seed=options.seed,
    )
    report["chosen_on"] = {"items": options.chosen_on} | report["chosen_on"]
    report["made_from"] = trained.identity
    path = options.output or options.run / threshold.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    threshold.write_report(report, path)
    print(_text(report))
    print(printable(str(path)))
    print(printable(str(write_figure(threshold_figure(report), path.with_suffix(".png")))))
    return 0


def _text(report: dict[str, Any]) -> str:
    chosen, test = report["chosen_on"], report["test"]
    wanted = report["false_match_rate"]
    rows = [["%", "test items", "95 % interval"]]
    for key, name in _RATES.items():
        rate = test[key]
        interval = f"{100 * rate['low']:.3g} to {100 * rate['high']:.3g}"
        rows.append([name, f"{100 * rate['value']:.3g}", interval])
    return "\n".join(
        [
            f"threshold {report['threshold']:.5f}, for a false-match rate of {100 * wanted:g} %",
            f"chosen on {chosen['classes']} {chosen['items']} items, {chosen['different_pairs']} "
            f"pairs of two items: {100 * chosen['false_match_rate']:.3g} % false matches, "
            f"{100 * chosen['false_non_match_rate']:.3g} % false non-matches",
            text_table(rows),
            f"{test['classes']} test items, {test['queries']} queries; the wanted rate is "
            f"{'within' if report['holds'] else 'NOT within'} the interval",
        ]
    )
