"""Write the network of a run as a file for other programs, or as a folder to publish.

    mmljax export RUN --output exported/
    mmljax export RUN --output exported/ --format onnx
    mmljax export RUN --output published/ --format hub --license apache-2.0

The file needs only jax and numpy, or with --format onnx only onnxruntime. It is loaded in a process
that can import nothing else, and must give the run's embeddings and neighbours there; a receipt has
the result. The exit code is 1 if it does not; an ONNX file is then not written. With --format hub
the folder has safetensors, configs and a model card, and --upload OWNER/NAME puts it on the Hugging
Face hub (--dry-run: says what would be uploaded). The command runs on the CPU unless JAX_PLATFORMS
is set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mmljax.cli import options as shared
from mmljax.errors import UserError, require
from mmljax.text import printable

if TYPE_CHECKING:
    from mmljax.inference.embedder import TrainedEmbedder
    from mmljax.types import Split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax export``."""
    shared.add_run(parser)
    shared.add_step(parser)
    parser.add_argument("--output", type=shared.local_path, required=True, help="folder to write")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="jax", help="of what is written; default jax"
    )
    checked = parser.add_argument_group("--format jax and --format onnx")
    checked.add_argument(
        "--image-size",
        type=shared.at_least(1),
        metavar="PIXELS",
        help="side of the crops that the file takes; default: the run's",
    )
    checked.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="images for the check, files or folders; default: the run's own queries",
    )
    checked.add_argument("--count", type=shared.at_least(2), help="how many of them; default 64")
    hub = parser.add_argument_group("--format hub")
    hub.add_argument(
        "--license", metavar="ID", help="of the weights, as the hub names it, such as apache-2.0"
    )
    hub.add_argument("--upload", metavar="OWNER/NAME", help="repository on the Hugging Face hub")
    hub.add_argument("--private", action="store_true", help="if the repository is made")
    hub.add_argument("--dry-run", action="store_true", help="say what --upload would do")


def run(options: argparse.Namespace) -> int:
    """Export; 1 if the check fails."""
    for flag in dict.fromkeys(flag for value in FORMATS.values() for flag in value.flags):
        owners = [name for name, value in FORMATS.items() if flag in value.flags]
        if options.format not in owners and getattr(options, flag) not in (None, False):
            raise UserError(
                f"--{flag.replace('_', '-')} belongs to --format {' and '.join(owners)}; omit one "
                "of them"
            )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return FORMATS[options.format].export(options)


def _hub(options: argparse.Namespace) -> int:
    from mmljax.inference import embed, hub

    if options.upload and not options.license:
        raise UserError("--upload needs --license ID, as the hub names it, such as apache-2.0")
    if (options.dry_run or options.private) and not options.upload:
        raise UserError("--dry-run and --private belong to --upload OWNER/NAME")
    trained = embed.load(options.run, step=options.step)
    sizes = hub.write_folder(
        trained, options.output, run=options.run, license_id=options.license or "unknown"
    )
    listed = ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
    print(printable(f"{options.output}: {listed}"))
    if options.upload and options.dry_run:
        print(printable(f"--dry-run: {options.upload} would get these files; nothing was sent"))
    elif options.upload:
        private = options.private
        address = hub.upload(options.output, options.upload, sizes=sizes, private=private)
        print(printable(f"{address}: load it by mmljax.load_embedder({address!r})"))
    return 0


def _jax(options: argparse.Namespace) -> int:
    require("flatbuffers", extra="offline", purpose="mmljax export")
    from mmljax.inference import export

    receipt = export.export_run(*_checked(options), options.output)
    text = (
        f"{options.output / export.ARTEFACT}: on {receipt['images']} images the embeddings differ "
        f"by at most {receipt['largest_difference']:.1e}, and "
        f"{receipt['queries_with_equal_neighbors']} have equal neighbours: parity "
        f"{'holds' if receipt['holds'] else 'does NOT hold'}"
    )
    print(printable(text))
    return 0 if receipt["holds"] else 1


def _onnx(options: argparse.Namespace) -> int:
    for package in ("onnx", "onnxruntime"):
        require(package, extra="onnx", purpose="--format onnx")
    from mmljax.inference import onnx_export

    receipt = onnx_export.export_run(*_checked(options), options.output)
    found = "are not all finite"
    if receipt["largest_difference"]:
        parts = (f"{x:.1e} in batches of {n}" for n, x in receipt["largest_difference"].items())
        found = f"differ by at most {', '.join(parts)}"
    text = (
        f"{options.output / onnx_export.ARTEFACT}: on {receipt['images']} images the embeddings "
        f"{found}, with {len(receipt['other_neighbors'])} other neighbours: parity "
        f"{'holds' if receipt['holds'] else 'does NOT hold; no file is written'}"
    )
    print(printable(text))
    for query, own, other in receipt["near_copies"]:
        print(printable(f"near-copies for the query {query}: {own} and {other} swap places"))
    return 0 if receipt["holds"] else 1


def _checked(options: argparse.Namespace) -> tuple[TrainedEmbedder, Split]:
    """The network, and the images for the check."""
    from mmljax.inference import embed, embedder

    trained = embed.load(options.run, step=options.step)
    if options.image_size:
        trained = embedder.at_image_size(trained, options.image_size)
    split = embed.chosen_images(trained, images=options.images, split=None)
    split = embed.rows_of(split, slice(options.count or 64))
    if len(split.labels) < 2:
        raise UserError("--images: one image has no neighbours to compare; name at least two")
    return trained, split


class _Format(NamedTuple):
    export: Callable[[argparse.Namespace], int]
    flags: tuple[str, ...]  # that not all formats have


FORMATS = {
    "jax": _Format(_jax, ("images", "count", "image_size")),
    "onnx": _Format(_onnx, ("images", "count", "image_size")),
    "hub": _Format(_hub, ("license", "upload", "private", "dry_run")),
}
