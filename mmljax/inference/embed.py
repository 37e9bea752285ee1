"""What the commands that use a trained network share: which images, and their embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmljax.errors import UserError

if TYPE_CHECKING:  # at run time only once the arguments are found good
    from mmljax.inference.embedder import TrainedEmbedder
    from mmljax.types import Batch, Split

SPLITS = ("train", "query", "gallery")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--run`` and ``--step``."""
    parser.add_argument("--run", type=Path, required=True, help="directory of a run: its --workdir")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the latest")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """``--images`` or ``--split``, and what happens to an image that cannot be decoded."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--images", nargs="+", metavar="PATH", help="image files, or folders and all below them"
    )
    choice.add_argument("--split", choices=SPLITS, help="of the run's own data set")
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out images that cannot be decoded, and count them",
    )


def add_piece_option(parser: argparse.ArgumentParser) -> None:
    """``--rows-per-part``."""
    parser.add_argument(
        "--rows-per-part",
        type=int,
        default=8192,
        help="images after which what is done is kept; default 8192",
    )


def require(package: str) -> None:
    """Check, before any work is done, that an optional package is there.

    Raises:
      UserError: if it is absent.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs {package}, which is absent; pip install 'mmljax[offline]'")


def quiet_libraries() -> None:
    """Silence of what tells too much, before it is loaded."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def chosen_images(
    trained: TrainedEmbedder, *, images: list[str] | None, split: str | None
) -> Split:
    """The images that the options name.

    Raises:
      UserError: if there is none, or the network does not take such images.
    """
    if images is not None:
        from mmljax.data.readers.image_files import list_images

        if trained.channels != 3:
            raise UserError(
                f"the network takes images of {trained.channels} channels, but files are read as "
                "colour; embed a --split of its own data"
            )
        return list_images(images, flag="--images")
    from mmljax.data.load import load_dataset

    found = getattr(load_dataset(trained.config), split or "query")
    if found is None:
        raise UserError(
            "--split=gallery: the run's queries search among themselves; take --split=query"
        )
    return found


def digest_of_images(split: Split) -> str:
    """Sixteen hexadecimal digits that change with any name or size, and with images in memory."""
    digest = hashlib.sha256()
    for name, image in zip(split.names, split.images, strict=True):
        if isinstance(image, str):
            size = os.stat(image).st_size if os.path.exists(image) else -1
            digest.update(f"{name}\0{size}\n".encode())
        else:
            stored = image if isinstance(image, bytes) else image.tobytes()
            digest.update(f"{name}\0{zlib.crc32(stored)}\n".encode())
    return digest.hexdigest()[:16]


def in_even_batches(trained: TrainedEmbedder) -> TrainedEmbedder:
    """The same with a batch size that divides over the devices of this machine."""
    import jax

    data, devices = trained.config.data, jax.device_count()
    size = -(-data.eval_batch_size // devices) * devices
    data = dataclasses.replace(data, eval_batch_size=size)
    return trained._replace(config=dataclasses.replace(trained.config, data=data))


def embed_images(
    trained: TrainedEmbedder,
    split: Split,
    *,
    skip_corrupt: bool,
    advance: Callable[[int], Any] = lambda images: None,
) -> tuple[Split, np.ndarray]:
    """The images that could be decoded, and their embeddings ``[n d]``, float32.

    Args:
      trained: the network.
      split: the images.
      skip_corrupt: whether to leave out images that cannot be decoded.
      advance: called with numbers of images that are done, in all those of the split; with a
        negative one for what must be done again.

    Raises:
      UserError: naming an image that cannot be decoded, unless such are to be left out, or whose
        embedding is not finite.
    """
    from mmljax.data.load import eval_batches

    batches = eval_batches(split, trained.config, trained.mesh)
    try:
        vectors = _embed(trained, split, batches, advance)
    except UserError as error:
        if not skip_corrupt:
            raise UserError(f"{error}; --skip-corrupt leaves out such images") from error
        from mmljax.data.pipeline import decodable

        kept = decodable(split, trained.config.data)
        if kept.all():
            raise
        for name in split.names[~kept]:
            print(f"left out: {name} cannot be decoded", file=sys.stderr)
        advance(int(np.sum(~kept)))
        split = rows_of(split, kept)
        batches = eval_batches(split, trained.config, trained.mesh)
        vectors = _embed(trained, split, batches, advance)
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise UserError(
            f"the embedding of image {split.names[bad][0]} is not finite; take another --step"
        )
    return split, vectors


def _embed(
    trained: TrainedEmbedder,
    split: Split,
    batches: Iterator[Batch],
    advance: Callable[[int], Any],
) -> np.ndarray:
    from mmljax.retrieval.evaluate import embed_batches

    total = len(split.labels)
    if not total:
        return np.zeros((0, trained.config.model.embedding_size), np.float32)
    done = 0

    def counted() -> Iterator[Batch]:
        nonlocal done
        for batch in batches:
            yield batch
            step = min(len(batch.labels), total - done)
            done += step
            advance(step)

    try:
        return embed_batches(trained.embed, counted())[0].astype(np.float32)
    except UserError:
        advance(-done)
        raise


def rows_of(split: Split, rows: Any) -> Split:
    """Some images of a split, by a slice or a mask."""
    return type(split)(*(column[rows] for column in split))


def pieces(split: Split, *, rows: int, batch: int) -> list[slice]:
    """Slices of a split of about ``rows`` images, whole batches each but for the last."""
    rows = max(1, rows // batch) * batch
    return [slice(first, first + rows) for first in range(0, len(split.labels), rows)]


def run(main: Callable[[], Any]) -> None:
    """A user's mistake is one line on stderr and exit code 2; 130 if it was broken off."""
    try:
        code = main()
    except UserError as error:
        print(f"mmljax: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("mmljax: broken off; give the same command again to go on", file=sys.stderr)
        code = 130
    sys.exit(code)


def bar(items: Sequence[Any], *, unit: str) -> Any:
    """The items with a progress bar, on stderr if that is a terminal.

    A ``tqdm`` bar: to be iterated over, or to be moved by its ``update`` within a ``with``.
    """
    from tqdm import tqdm

    return tqdm(items, unit=unit, disable=None, file=sys.stderr, dynamic_ncols=True)
