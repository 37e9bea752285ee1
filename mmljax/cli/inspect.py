"""Find near copies, leaks, wrong labels and unusable files in a data set.

    mmljax inspect photos/ --output findings/
    mmljax inspect --config configs/inshop.py --output findings/

Images are compared by the features of a pretrained network: that of --config, by default
EfficientNet-Lite0 of configs/finetune.py. Nothing in the data is changed. exclude.csv lists images
with a reason each; delete the rows of those to keep, and train with
--config.data.exclude=findings/exclude.csv. page.html shows them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from mmljax.cli import options as shared
from mmljax.errors import UserError, require
from mmljax.text import printable

if TYPE_CHECKING:
    from mmljax.config import Config
    from mmljax.inference.inspect_data import Report

LIST, PAGE = "exclude.csv", "page.html"

PRECISION = 0.95
"""Of suspect labels by default; its estimate was found some points too high (docs)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax inspect``."""
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder with a folder per item")
    shared.add_config(parser, workdir=False)
    parser.add_argument("--output", type=shared.local_path, required=True, help="folder to write")
    parser.add_argument(
        "--precision",
        type=shared.share,
        default=PRECISION,
        help=f"wanted share of wrong labels among those that are called wrong; default {PRECISION}",
    )


def run(options: argparse.Namespace) -> int:
    """Inspect the data that the options name."""
    for module in ("PIL", "jinja2"):
        require(module, extra="page", purpose="mmljax inspect")
    config = _config(options)
    from mmljax.data.load import load_dataset
    from mmljax.files import replacing
    from mmljax.inference import findings_page, inspect_data
    from mmljax.inference.baseline import check_pretrained, make_pretrained_embed
    from mmljax.mesh import make_mesh

    check_pretrained(config)
    dataset = load_dataset(config, create=False)
    with replacing(options.output, (PAGE, LIST), flag="--output") as folder:
        images = inspect_data.all_images(dataset)
        embed = make_pretrained_embed(config, dataset, make_mesh())
        report = inspect_data.inspect(dataset, config, embed, precision=options.precision)
        summary = _summary(report)
        title = options.data or config.data.directory or config.data.source
        page = findings_page.render(report, images.split, title=title, summary=summary)
        (folder / PAGE).write_text(page, encoding="utf-8")
        (folder / LIST).write_text(inspect_data.exclusion_list(report), encoding="utf-8")
    for line in (summary, f"list  {options.output / LIST}", f"page  {options.output / PAGE}"):
        print(printable(line))
    return 0


def _config(options: argparse.Namespace) -> Config:
    from mmljax import config as configs

    if options.data is None and options.config is None:
        raise UserError("name a folder of images, or --config CONFIG of other data")
    if options.data is not None and options.config is not None:
        raise UserError(
            f"{options.data} and --config={options.config} name two data sets; omit one of them"
        )
    if options.data is None:
        return configs.load_config(options.config, options.overrides)
    return configs.load_config("finetune", [*options.overrides, f"data.directory={options.data}"])


def _summary(report: Report) -> str:
    counts = Counter(finding.reason for finding in report.findings)
    parts = [f"{count} {reason}" for reason, count in counts.items()] or ["nothing doubtful"]
    text = f"{report.images} images of {report.items} items: {', '.join(parts)}"
    if report.labels is not None:
        text += f"; about {100 * report.labels.wrong:.1f} % of the labels seem wrong"
        if report.labels.recall:
            text += f", of which {100 * report.labels.recall:.0f} % are listed"
    return text
