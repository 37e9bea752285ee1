"""Image files that belong to no data set: which there are, and which of them can be decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from mmljax.config import DataConfig
from mmljax.errors import UserError
from mmljax.types import Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


def list_images(paths: Sequence[str | os.PathLike[str]], *, flag: str) -> Split:
    """Images by their paths: of files, and of all folders below a folder.

    Args:
      paths: files, which must be there, and folders, of which the files of ``SUFFIXES`` count
        (in any case of letters; hidden ones do not). Links to folders are not followed.
      flag: that names the paths, for errors.

    Returns:
      Images in the order of the paths, those of a folder sorted by name. The name of an image is
      its path below the folder, with ``/``, if one folder is given, and else its path as given.
      Labels are -1.

    Raises:
      UserError: if a path is absent, there is no image, or a name is not Unicode.
    """
    found: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = _below(path)
            if not inside:
                raise UserError(
                    f"{flag}: {path} holds no image; the names of images end in "
                    f"{', '.join(SUFFIXES)}"
                )
            root = "" if len(paths) == 1 else path.as_posix() + "/"
            found += [(str(path / name), root + name) for name in inside]
        elif path.is_file():
            found.append((str(path), path.as_posix()))
        else:
            raise UserError(f"{flag}: {path} does not exist; name an image or a folder of images")
    for _, name in found:
        if name != name.encode(errors="replace").decode():
            raise UserError(f"{flag}: the name {name!r} is no Unicode text; rename the file")
    images, names = (np.array(column) for column in zip(*found, strict=True))
    return Split(images, np.full(len(found), -1, np.int32), names)


def decodable(split: Split, config: DataConfig) -> Bool[np.ndarray, " n"]:
    """Which images can be read and decoded, each tried as an evaluation would decode it."""
    import tensorflow as tf

    from mmljax.data import pipeline as pipeline  # hides the accelerators from TensorFlow
    from mmljax.data import transforms

    encoded = isinstance(split.images[0], bytes)
    read = tf.identity if encoded else tf.io.read_file
    contents = np.empty(len(split.images), object)
    contents[:] = [os.fsencode(image) for image in split.images]

    def attempt(row: tf.Tensor, contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = transforms.center_crop(
            read(contents), resize_size=config.resize_size, image_size=config.image_size
        )
        return row, tf.reduce_max(image)  # of which nobody asks, but so it must be decoded

    rows = tf.data.Dataset.from_tensor_slices((np.arange(len(contents)), contents))
    threads = config.threads or os.cpu_count()
    rows = rows.map(attempt, num_parallel_calls=threads).ignore_errors()
    valid = np.zeros(len(contents), bool)
    valid[[row for row, _ in rows.as_numpy_iterator()]] = True
    return valid


def _below(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root).relative_to(folder)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)
