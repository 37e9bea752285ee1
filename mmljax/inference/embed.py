"""Embeddings of image files or of a split, written as a resumable Parquet file."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from mmljax.config import ModelConfig
from mmljax.data.decoding import DECODING
from mmljax.data.load import eval_batches, load_dataset
from mmljax.data.readers.image_files import list_images
from mmljax.errors import UserError
from mmljax.inference import embedder
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.inference.embedding_file import FLOAT32, FORMAT, embeddings_table
from mmljax.inference.hub import SOURCE
from mmljax.inference.parquet_parts import Parts
from mmljax.retrieval.evaluate import embed_batches
from mmljax.types import Batch, Split

_log = logging.getLogger(__name__)


def load(run: Path, *, step: int | None, dims: int | None = None) -> TrainedEmbedder:
    """The network of a run, with an evaluation batch size that this machine's devices divide.

    Args:
      run: its directory.
      step: of the checkpoint; the latest if None.
      dims: how many of the first dimensions its embeddings have; all if None. A warning says if
        the run was not trained for that number.

    Raises:
      UserError: as :func:`mmljax.inference.embedder.load_embedder`, and if there are fewer.
    """
    trained = embedder.load_embedder(run, step=step)
    if dims is not None:
        trained = embedder.with_dimensions(trained, dims)
        _warn_if_untrained(trained.config.model, dims)
    data, devices = trained.config.data, jax.device_count()
    size = -(-data.eval_batch_size // devices) * devices
    data = dataclasses.replace(data, eval_batch_size=size)
    return trained._replace(config=dataclasses.replace(trained.config, data=data))


def _warn_if_untrained(model: ModelConfig, dims: int) -> None:
    weights = model.matryoshka_weights or (1.0,) * len(model.matryoshka)
    sizes = [size for size, weight in zip(model.matryoshka, weights, strict=True) if weight > 0]
    if dims not in (*sizes, model.embedding_size):
        _log.warning(
            "warning: --dims=%d is no size that the run was trained for (%s); it may find less "
            "than a run with that size in --config.model.matryoshka",
            dims,
            ", ".join(map(str, sizes)) or f"{model.embedding_size} alone",
        )


def chosen_images(
    trained: TrainedEmbedder, *, images: Sequence[str] | None, split: str | None
) -> Split:
    """Image files, or a split of the run's own data set; its queries if neither is named.

    Args:
      trained: the network.
      images: paths of image files and folders.
      split: ``train``, ``query`` or ``gallery``.

    Raises:
      UserError: if there is no image, or the network does not take such images.
    """
    if images is not None:
        if trained.channels != 3:
            raise UserError(
                f"the network takes images of {trained.channels} channels, but files are read in "
                "colour; use a --split of the run's own data set"
            )
        return list_images(images, flag="--images")
    if trained.config.data.source == SOURCE:
        raise UserError("an exported network has no data set of its own; name --images")
    found = getattr(load_dataset(trained.config, create=False), split or "query")
    if found is None:
        raise UserError("--split=gallery: the run has no gallery of its own; use --split=query")
    return found


def images_digest(split: Split) -> str:
    """Sixteen hexadecimal digits of names and sizes, and of the pixels of images in memory."""
    digest = hashlib.sha256()
    for name, image in zip(split.names, split.images, strict=True):
        if isinstance(image, str):
            size = os.stat(image).st_size if os.path.exists(image) else -1
            digest.update(f"{name}\0{size}\n".encode())
        else:
            stored = image if isinstance(image, bytes) else image.tobytes()
            digest.update(f"{name}\0{zlib.crc32(stored)}\n".encode())
    return digest.hexdigest()[:16]


def embed_images(
    trained: TrainedEmbedder,
    split: Split,
    *,
    skip_corrupt: bool,
    advance: Callable[[int], Any] = lambda images: None,
) -> tuple[Split, Float[np.ndarray, "n d"]]:
    """The images that could be decoded, and their embeddings, float32.

    Args:
      trained: the network.
      split: the images.
      skip_corrupt: whether to leave out images that cannot be decoded; a warning names each.
      advance: called with the number of images finished since the last call; a negative number
        takes back images that are embedded again. The numbers add up to those of the split.

    Raises:
      UserError: if an image cannot be decoded and ``skip_corrupt`` is false, or an embedding is not
        finite; names the image.
    """
    try:
        vectors = _embed(trained, split, advance)
    except UserError as error:
        if not skip_corrupt:
            raise UserError(f"{error}; --skip-corrupt leaves out such images") from error
        from mmljax.data.pipeline import decodable  # needs TensorFlow

        kept = decodable(split, trained.config.data)
        if kept.all():
            raise
        for name in split.names[~kept]:
            _log.warning("left out: %s cannot be decoded", name)
        advance(int(np.sum(~kept)))
        split = rows_of(split, kept)
        vectors = _embed(trained, split, advance)
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise UserError(
            f"the embedding of image {split.names[bad][0]} is not finite; use another --step"
        )
    return split, vectors


def _embed(
    trained: TrainedEmbedder, split: Split, advance: Callable[[int], Any]
) -> Float[np.ndarray, "n d"]:
    total, done = len(split.labels), 0
    if not total:
        return np.zeros((0, trained.identity["embedding_size"]), np.float32)

    def counted() -> Iterator[Batch]:
        nonlocal done
        for batch in eval_batches(split, trained.config, trained.mesh):
            yield batch
            count = min(len(batch.labels), total - done)
            done += count
            advance(count)

    try:
        return embed_batches(trained.embed, counted())[0].astype(np.float32)
    except UserError:
        advance(-done)
        raise


def rows_of(split: Split, rows: slice | Bool[np.ndarray, " n"]) -> Split:
    """Some images of a split."""
    return type(split)(*(column[rows] for column in split))


def embedded_parts(
    trained: TrainedEmbedder,
    split: Split,
    *,
    rows_per_part: int,
    skip_corrupt: bool,
    skip: Callable[[int], bool] = lambda number: False,
    progress: bool = True,
) -> Iterator[tuple[int, Split, Float[np.ndarray, "n d"]]]:
    """Embed a split part by part: the part's number, its images and their embeddings.

    Args:
      trained: the network.
      split: the images.
      rows_per_part: about how many images; all parts but the last consist of full batches.
      skip_corrupt: as :func:`embed_images`.
      skip: whether the part of a number is finished already.
      progress: whether to show a progress bar, where stderr is a terminal.
    """
    with progress_bar(split.labels, shown=progress) as bar:
        for number, part in enumerate(_slices(trained, split, rows_per_part)):
            rows = rows_of(split, part)
            if skip(number):
                bar.update(len(rows.labels))
            else:
                yield (
                    number,
                    *embed_images(trained, rows, skip_corrupt=skip_corrupt, advance=bar.update),
                )


def count_parts(trained: TrainedEmbedder, split: Split, *, rows_per_part: int) -> int:
    """The number of parts of :func:`embedded_parts`."""
    return len(_slices(trained, split, rows_per_part))


def _slices(trained: TrainedEmbedder, split: Split, rows_per_part: int) -> list[slice]:
    batch = trained.config.data.eval_batch_size
    rows = max(1, rows_per_part // batch) * batch
    return [slice(first, first + rows) for first in range(0, len(split.labels), rows)]


def progress_bar(items: Sequence[Any], *, shown: bool = True) -> Any:
    """A ``tqdm`` bar of images: to be iterated over, or moved by ``update`` within a ``with``."""
    from tqdm import tqdm

    disable = None if shown else True  # None: where stderr is no terminal
    return tqdm(items, unit="image", disable=disable, file=sys.stderr, dynamic_ncols=True)


def write_embeddings(
    trained: TrainedEmbedder,
    split: Split,
    output: Path,
    *,
    source: str,
    rows_per_part: int,
    skip_corrupt: bool,
    dtype: str = FLOAT32,
) -> tuple[int, int] | None:
    """Write a file of embeddings (:mod:`mmljax.inference.embedding_file`), or resume writing it.

    Args:
      trained: the network.
      split: the images.
      output: the file.
      source: what the images are, for the metadata.
      rows_per_part: images between two saves.
      skip_corrupt: whether to leave out images that cannot be decoded.
      dtype: of the vectors that a search reads: float32, or int8 or binary beside float32.

    Returns:
      The numbers of images in the file and left out; None if the file was complete before.

    Raises:
      UserError: if the output has other contents, is being written by another process or cannot be
        written, or an image, or all of them, cannot be decoded.
    """
    identity = {
        "format": FORMAT,
        **trained.identity,
        "source": source,
        "images": len(split.labels),
        "digest": images_digest(split),
        "decoding": "none" if split.images.ndim > 1 else DECODING,
        "batch": trained.config.data.eval_batch_size,
        "rows_per_part": rows_per_part,
        "skip_corrupt": skip_corrupt,
        "dtype": dtype,
    }
    with Parts(output, identity) as parts:
        if parts.finished:
            return None
        for number, kept, vectors in embedded_parts(
            trained, split, rows_per_part=rows_per_part, skip_corrupt=skip_corrupt, skip=parts.has
        ):
            table = embeddings_table(kept.names, kept.labels, vectors, dtype=dtype)
            parts.write(number, table)
        total = count_parts(trained, split, rows_per_part=rows_per_part)
        count = sum(map(parts.rows, range(total)))
        if not count:
            raise UserError(f"none of the {len(split.labels)} images can be decoded; name others")
        left_out = len(split.labels) - count
        facts = {"rows": count, "left_out": left_out, "folder": _folder(split)}
        parts.join(total, facts=facts)
    return count, left_out


def _folder(split: Split) -> str | None:
    """What the paths of image files begin with before their names; None of other images."""
    path, name = split.images[0], str(split.names[0])
    return path.removesuffix(name) if isinstance(path, str) and path.endswith(name) else None
