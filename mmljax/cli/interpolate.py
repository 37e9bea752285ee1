"""Score networks between a run's pretrained and its fine-tuned weights (WiSE-FT).

    mmljax interpolate RUN --alphas 0,0.25,0.5,0.75,1

The backbone's weights are (1 - alpha) * pretrained + alpha * fine-tuned; the head is the fine-tuned
one. The row `features` is of the pretrained backbone's pooled features, without a head. A point
between the ends can be better than both. --save writes the network of one alpha as a run's
directory, which embed, search and export take, without scoring any:

    mmljax interpolate RUN --save 0.5 --output runs/between
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from mmljax.cli import options as shared
from mmljax.errors import UserError
from mmljax.text import printable, text_table

Curve = Mapping[float, Mapping[str, float]]  # scores by alpha


def _alpha(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, found {text}")
    return value


def _alphas(text: str) -> list[float]:
    return [_alpha(part) for part in text.split(",")]


_alpha.__name__ = "number"  # argparse puts them into its errors
_alphas.__name__ = "list of numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax interpolate``."""
    shared.add_run(parser)
    shared.add_step(parser)
    shared.add_directory(parser)
    parser.add_argument(
        "--alphas",
        type=_alphas,
        default=[i / 10 for i in range(11)],
        metavar="A,B,...",
        help="to be scored, beside 0 and 1; default 0,0.1,...,1",
    )
    parser.add_argument("--save", type=_alpha, metavar="ALPHA", help="write this network")
    parser.add_argument("--output", type=shared.local_path, help="new directory for --save")
    parser.add_argument(
        "--pretrained", help="where the pretrained weights are now; default: as the config says"
    )


def run(options: argparse.Namespace) -> int:
    """Print the scores of all alphas and what they say, or write the network of one."""
    if (options.save is None) != (options.output is None):
        raise UserError("--save ALPHA and --output DIRECTORY go together; give both or none")
    from mmljax.inference import interpolate
    from mmljax.inference.embedder import load_embedder
    from mmljax.runs.reader import load_run_data

    trained = load_embedder(options.run, step=options.step)
    pretrained = interpolate.pretrained_weights(trained, source=options.pretrained or "")
    if options.save is not None:
        source = options.pretrained or trained.config.model.pretrained
        folder = options.output
        interpolate.save(trained, pretrained, alpha=options.save, source=source, folder=folder)
        print(printable(f"{folder}: the network of alpha {options.save:g}"))
        return 0
    _, dataset = load_run_data(options.run, directory=options.directory)
    scores, features = interpolate.curve(trained, pretrained, dataset, options.alphas)
    recalls = [f"recall@{k}" for k in sorted(trained.config.evaluation.recall_at)]
    print(_table(scores, features, [*recalls, "map@r"]))
    for key in (recalls[0], "map@r"):
        _warn(scores, features, key)
        _name_best(scores, key, best=interpolate.best_alpha(scores, key))
    print(
        f"{scores[1.0]['queries']:.0f} queries. The best alpha was chosen on these images, so its "
        "score is optimistic."
    )
    return 0


def _table(scores: Curve, features: Mapping[str, float], keys: list[str]) -> str:
    """In percent, a row per alpha after that of the features."""
    named = {"features": features, **{f"{alpha:g}": row for alpha, row in scores.items()}}
    rows = [[name, *(f"{100 * row[key]:.2f}" for key in keys)] for name, row in named.items()]
    return text_table([["alpha", *keys], *rows])


def _warn(scores: Curve, features: Mapping[str, float], key: str) -> None:
    """Print where fine-tuning made a score worse."""
    before = {
        "the pretrained backbone (alpha 0)": scores[0.0],
        "the pretrained features without a head": features,
    }
    for name, row in before.items():
        if row[key] > scores[1.0][key]:
            text = (
                f"warning: fine-tuning made {key} worse: {100 * row[key]:.2f} % with {name}, "
                f"{100 * scores[1.0][key]:.2f} % with the fine-tuned network (alpha 1)"
            )
            print(text, file=sys.stderr)


def _name_best(scores: Curve, key: str, *, best: float) -> None:
    """Print which alpha is best by one score."""
    text = f"{key}: alpha {best:g} is best, {100 * scores[best][key]:.2f} %"
    if 0 < best < 1:
        gain = 100 * (scores[best][key] - scores[1.0][key])
        more = f"--save {best:g} --output DIRECTORY writes it"
        print(f"{text}, {gain:.2f} points above the fine-tuned network; {more}")
    else:
        print(f"{text}; no point between the ends is better")
