"""Write the scores, curves and worst queries of a run as one HTML file.

    mmljax page RUN --worst 300

The file needs no network and no other file. --worst is the number of queries that it shows.
"""

from __future__ import annotations

import argparse

from mmljax.cli import options as shared
from mmljax.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax page``."""
    shared.add_run(parser)
    parser.add_argument(
        "--output", type=shared.local_path, help="HTML file; default: page.html in RUN"
    )
    parser.add_argument(
        "--worst", type=shared.at_least(1), default=200, help="queries shown; default 200"
    )
    shared.add_directory(parser)


def run(options: argparse.Namespace) -> int:
    """Write the page of the run that the options name."""
    from mmljax.runs.html import write_page
    from mmljax.runs.reader import load_run_data

    config, dataset = load_run_data(options.run, directory=options.directory)
    path = write_page(
        options.run, dataset=dataset, config=config, output=options.output, worst=options.worst
    )
    print(printable(str(path)))
    return 0
