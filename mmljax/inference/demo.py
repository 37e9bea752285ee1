"""A search by photograph for a web page: one image in, the nearest images of a gallery out.

:mod:`mmljax.inference.demo_server` serves it. Images of the gallery are known by row number alone;
their files are those that the gallery's column ``id`` names.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmljax.data import paths
from mmljax.data.decoding import KINDS
from mmljax.data.load import load_dataset
from mmljax.data.thumbnails import thumbnail, webp
from mmljax.errors import UserError
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.inference.embedding_file import Gallery, read_gallery
from mmljax.inference.search import search
from mmljax.types import Split

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP")
MAX_BYTES, MAX_PIXELS = 20 * 2**20, 50_000_000  # of a photograph

_SIDE, _QUALITY = 256, 80  # of the gallery's pictures
_DAMAGED = "this image is damaged and cannot be decoded"
_log = logging.getLogger(__name__)


class Refused(Exception):
    """A photograph that cannot be searched for: an HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Demo:
    """A network, a gallery and its images; safe to call from several threads."""

    def __init__(
        self,
        trained: TrainedEmbedder,
        gallery: Gallery,
        images: Split,
        *,
        k: int,
        threshold: float | None,
    ) -> None:
        """Compile the network for one photograph, and the search for one query.

        Args:
          trained: the network, of colour images.
          gallery: with float32 vectors.
          images: those of the gallery's rows.
          k: answers per photograph.
          threshold: least similarity of a match, if one is known.
        """
        self._trained = trained
        self._gallery = gallery._replace(codes=None, ids=_row_numbers(gallery))
        self._images, self._lock = images, threading.Lock()
        self.facts = {
            "run": trained.identity["run"],
            "step": trained.identity["step"],
            "images": len(images.names),
            "k": k,
            "threshold": threshold,
            "max_bytes": MAX_BYTES,
        }
        from PIL import Image

        blank = io.BytesIO()
        Image.new("RGB", (16, 16), "grey").save(blank, "PNG")
        self.answer(blank.getvalue())

    def answer(self, photograph: bytes) -> dict[str, Any]:
        """The nearest images, best first, and the time that each part took.

        Args:
          photograph: an image file of ``FORMATS``.

        Raises:
          Refused: if it is none, damaged or too large.
        """
        from mmljax.data.pipeline import evaluation_crop  # needs TensorFlow

        _check(photograph)
        names = np.array(["photograph"])
        query = Split(np.array([photograph], object), np.full(1, -1, np.int32), names)
        with self._lock:
            start = time.perf_counter()
            try:
                crop = evaluation_crop(query, 0, self._trained.config.data)
            except UserError as error:
                raise Refused(400, _DAMAGED) from error
            vectors = np.asarray(self._trained.embed(jnp.asarray(crop[None])), np.float32)
            embedded = time.perf_counter()
            found = search(self._gallery, names, vectors, k=self.facts["k"])
            ended = time.perf_counter()
        return {
            "answers": [self._shown(row) for row in found.to_pylist()],
            "milliseconds": {
                "embed": round(1000 * (embedded - start), 1),
                "search": round(1000 * (ended - embedded), 1),
            },
        }

    def _shown(self, answer: dict[str, Any]) -> dict[str, Any]:
        row = answer["id"]
        name = str(self._images.names[row])
        similarity, label = answer["similarity"], answer["label"]
        return {"row": row, "similarity": similarity, "name": name, "label": label}

    def picture(self, row: int) -> bytes:
        """A small WebP picture of a gallery image, without the metadata of its file.

        Raises:
          Refused: if there is no such row, or its image cannot be read.
        """
        if not 0 <= row < len(self._images.names):
            raise Refused(404, f"the gallery has no row {row}")
        try:
            return webp(thumbnail(self._images, row, side=_SIDE), side=_SIDE, quality=_QUALITY)
        except UserError as error:
            _log.warning("%s", error)
            raise Refused(404, f"the image of row {row} cannot be read") from error


def _row_numbers(gallery: Gallery) -> Any:
    import pyarrow as pa

    return pa.array(range(len(gallery.ids)))


def _check(photograph: bytes) -> None:
    """Refuse by the header, before any pixel is decoded."""
    from PIL import Image, UnidentifiedImageError

    if len(photograph) > MAX_BYTES:
        raise Refused(413, f"this file is larger than {MAX_BYTES // 2**20} MiB")
    too_large = Image.DecompressionBombWarning, Image.DecompressionBombError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(photograph), formats=FORMATS) as image:
                pixels = image.width * image.height
    except UnidentifiedImageError as error:
        raise Refused(415, f"this is no {KINDS} file") from error
    except too_large:
        pixels = MAX_PIXELS + 1
    except (OSError, ValueError, SyntaxError) as error:
        raise Refused(400, _DAMAGED) from error
    if pixels > MAX_PIXELS:
        raise Refused(413, f"this image has more than {MAX_PIXELS / 1e6:.0f} million pixels")


class Opened(NamedTuple):
    """A gallery and the images of its rows."""

    gallery: Gallery
    images: Split


def open_gallery(path: Path, trained: TrainedEmbedder, *, folder: Path | None) -> Opened:
    """The vectors of a file of embeddings, and where the images of its rows are.

    Args:
      path: the file.
      trained: the run's network; a gallery of a split has the images of its data set.
      folder: of the images; None: that which ``mmljax embed`` was given.

    Raises:
      UserError: if the file cannot be read, or its images are not there.
    """
    gallery = read_gallery(path, exact=True)
    names, labels = np.array(gallery.ids.to_pylist(), str), np.full(len(gallery.ids), -1, np.int32)
    source, _, split = str(gallery.made_from.get("source")).partition(" ")
    if source == "split" and folder is None:
        return Opened(gallery, Split(_of_split(trained, split, names, path), labels, names))
    root = gallery.made_from.get("folder", "") if folder is None else str(folder)
    if root:
        for row, name in enumerate(names):
            if os.path.isabs(name) or ".." in name.split("/") or paths.is_remote(name):
                raise UserError(f"{path}: row {row} names a file outside of {root}: {name}")
    missing = paths.absent(root, names.tolist())
    if missing:
        text = f"{paths.join(root, names[missing[0]])} of {path} does not exist"
        if len(missing) == len(names):
            raise UserError(f"{text}, nor any other image; add --images FOLDER, where they are")
        _log.warning("%s, and %d more; they have no picture", text, len(missing) - 1)
    images = np.array([paths.join(root, name) for name in names])
    return Opened(gallery, Split(images, labels, names))


def _of_split(trained: TrainedEmbedder, split: str, names: np.ndarray, path: Path) -> np.ndarray:
    """Images of a split of the run's data set, by name."""
    found = getattr(load_dataset(trained.config, create=False), split, None)
    if found is None:
        raise UserError(f"{path}: the run's data set has no split {split}; add --images FOLDER")
    rows = {name: row for row, name in enumerate(found.names)}
    try:
        return found.images[[rows[name] for name in names]]
    except KeyError as error:
        raise UserError(
            f"{path}: the run's data set has no image {error.args[0]} in its split {split}; add "
            "--images FOLDER, where they are"
        ) from None
