"""Show a web page of this machine that searches a gallery by photograph.

    mmljax demo RUN --gallery photos.parquet

The gallery is a file of mmljax embed, and its images are where they were when it was made, or in
the folder that --images names. The threshold that mmljax threshold has written for the run decides
what is a match; the page can move it. Only this machine reaches the page, unless --host names
another of its addresses: then everybody who reaches that address can search. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from mmljax.cli import options as shared
from mmljax.cli.search import read_threshold, refuse_others
from mmljax.errors import UserError, require
from mmljax.text import printable

if TYPE_CHECKING:
    from mmljax.inference.demo import Demo
    from mmljax.inference.embedder import TrainedEmbedder

_K = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax demo``."""
    shared.add_run(parser)
    shared.add_step(parser)
    shared.add_embeddings(parser, "--gallery")
    parser.add_argument(
        "--images",
        type=shared.local_path,
        metavar="FOLDER",
        help="where the gallery's images are now; default: where mmljax embed found them",
    )
    parser.add_argument(
        "--k", type=shared.at_least(1), help=f"images per photograph; default at most {_K}"
    )
    parser.add_argument(
        "--threshold",
        metavar="T",
        help="least similarity of a match: a number, or the file that mmljax threshold wrote; "
        "default: threshold.json in RUN, where there is one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, this machine alone")
    parser.add_argument(
        "--port", type=_port, default=8000, help="default 8000; 0: one that is free"
    )
    shared.add_force(parser)


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, found {text}")
    return port


def run(options: argparse.Namespace) -> int:
    """Serve the page of the run and gallery that the options name."""
    for module in ("starlette", "uvicorn", "PIL", "pyarrow"):
        require(module, extra="demo", purpose="mmljax demo")
    require("tensorflow", extra="data", purpose="mmljax demo")
    from mmljax.inference import demo_server

    with contextlib.closing(demo_server.listen(options.host, options.port)) as listening:
        demo = load(options)
        address = demo_server.address_of(options.host, listening)
        print(printable(f"{demo.facts['images']} images; open {address} and end by Ctrl-C"))
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            demo_server.make_server(demo, host=options.host).run(sockets=[listening])
    return 0


def load(options: argparse.Namespace) -> Demo:
    """The network and the gallery that the options name, ready to answer."""
    from mmljax.inference import demo, embed, search
    from mmljax.inference.embedder import FIRST_OF
    from mmljax.inference.embedding_file import read_metadata

    made_from = read_metadata(options.gallery)
    dims = made_from["embedding_size"] if FIRST_OF in made_from else None  # embed --dims
    trained = embed.load(options.run, step=options.step, dims=dims)
    if trained.channels != 3:
        raise UserError(
            f"the network takes images of {trained.channels} channels, but photographs have "
            "colour; use a run on colour images"
        )
    k = options.k or min(_K, made_from["rows"])
    search.check_fit(made_from, trained, k=k, rescore=None, where=options.gallery)
    refuse_others(options, options.gallery, search.differences(made_from, trained))
    threshold = _threshold(options, trained)
    gallery, images = demo.open_gallery(options.gallery, trained, folder=options.images)
    return demo.Demo(trained, gallery, images, k=k, threshold=threshold)


def _threshold(options: argparse.Namespace, trained: TrainedEmbedder) -> float | None:
    from mmljax.inference import search, threshold

    written = options.run / threshold.FILE
    given = options.threshold is not None
    if not given and not written.exists():
        return None
    file = options.threshold if given else str(written)
    value, chosen_for = read_threshold(file)
    if chosen_for is not None:
        differing = search.differences(chosen_for, trained)
        if differing and not given:
            text = f"{file} is left out: it was made for another network ({'; '.join(differing)})"
            print(printable(f"warning: {text}"), file=sys.stderr)
            return None
        refuse_others(options, file, differing)
    return value
