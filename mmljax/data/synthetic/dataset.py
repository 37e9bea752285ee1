"""The embedded data set: generated photographs of garments, in the layout of In-Shop.

Unlike a benchmark it needs no download and no agreement, and it is small enough for a first run
on a CPU. Light, framing, pose, background and noise differ between photographs, and items share
colours, cuts and patterns, so neither pixels nor colour histograms identify an item.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mmljax.config import SyntheticConfig
from mmljax.data.limits import available_memory, check_memory
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.in_shop_list import HEADER, PARTITION
from mmljax.data.readers.splits import DIRECTORY_FLAG
from mmljax.data.synthetic.drawing import draw
from mmljax.data.synthetic.garments import CUTS, Garments, Photos, make_garments, make_photos
from mmljax.data.tensorflow_devices import import_tensorflow
from mmljax.errors import UserError
from mmljax.types import Dataset

MARK = "mmljax_synthetic.json"
"""File in the folder of a generated set that holds its config."""

_DRAWING = 1  # to be raised whenever the same config gives other pixels
_BLOCK = 16  # images drawn at once, so that they fit into a processor's cache
_JPEG_QUALITY = 92


def synthetic_folder(directory: str | os.PathLike[str], config: SyntheticConfig) -> Path:
    """The folder of the set of ``config`` below ``directory``, named by a hash of the config.

    Sets of several configs lie side by side, so that no run overwrites the data of another one.

    Raises:
      UserError: if ``directory`` is empty.
    """
    if not os.fspath(directory):
        raise UserError(f"{DIRECTORY_FLAG} is empty; name a folder for the generated images")
    digest = hashlib.sha256(_mark(config).encode()).hexdigest()[:8]
    return Path(os.path.abspath(directory)).resolve() / f"synthetic-{digest}"


def read_synthetic(directory: str | os.PathLike[str], config: SyntheticConfig) -> Dataset:
    """The generated set of ``config`` below ``directory``; nothing is written.

    Raises:
      UserError: if it is absent or incomplete.
    """
    folder = synthetic_folder(directory, config)
    if not _is_complete(folder, config):
        raise UserError(
            f"{DIRECTORY_FLAG}={os.fspath(directory)!r} lacks the generated images of this config "
            f"({folder.name}); only training writes them: mmljax train --config CONFIG "
            f"{DIRECTORY_FLAG}={os.fspath(directory)}"
        )
    return read_in_shop(folder)


def write_synthetic(directory: str | os.PathLike[str], config: SyntheticConfig) -> Path:
    """Make sure that the generated set of ``config`` exists below ``directory``.

    A complete set is kept as it is; one that lacks files is made again. The set is written beside
    its folder and renamed, so an interrupted call leaves no partial one, and several processes may
    call at once. Even views of a test item are queries, odd ones its gallery.

    Args:
      directory: need not exist.
      config: how many items and photographs, their size, the seed.

    Returns:
      The folder of the set, as ``synthetic_folder``, which ``read_in_shop`` reads.

    Raises:
      UserError: if the directory cannot be written, or holds a folder of the set's name that was
        not generated; if the config makes no data set, or one larger than the memory.
    """
    _check(config)
    folder = synthetic_folder(directory, config)
    if _is_complete(folder, config):
        return folder
    _check_ours(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as at:
            _write(Path(at, "new"), config)
            _put(Path(at, "new"), folder, config, old=Path(at, "old"))
    except OSError as error:
        raise UserError(
            f"{DIRECTORY_FLAG}={os.fspath(directory)!r} cannot be written ({error}); name a "
            "directory on a disk with room, where you may write"
        ) from error
    return folder


def synthetic_images(
    config: SyntheticConfig,
) -> tuple[UInt8[np.ndarray, "n views size size 3"], Garments, Photos]:
    """The photographs of ``config``, before JPEG.

    Returns:
      Photographs of the training items and then of the test items; the items ``[n]``; the
      parameters of each photograph, ``[n views]`` flattened.
    """
    random = np.random.default_rng(config.seed)
    items = config.train_items + config.test_items
    garments = make_garments(random, items)
    photos = make_photos(random, items * config.views)
    shown = Garments(*(field.repeat(config.views, axis=0) for field in garments))
    images = np.concatenate(
        [
            draw(
                Garments(*(field[start : start + _BLOCK] for field in shown)),
                Photos(*(field[start : start + _BLOCK] for field in photos)),
                random,
                size=config.image_size,
            )
            for start in range(0, items * config.views, _BLOCK)
        ]
    )
    return images.reshape(items, config.views, *images.shape[1:]), garments, photos


def _check(config: SyntheticConfig) -> None:
    for name, least in {"train_items": 1, "test_items": 1, "views": 2, "image_size": 8}.items():
        value = getattr(config, name)
        if value < least:
            raise UserError(f"--config.data.synthetic.{name}={value}: set it to {least} or more")
    if config.seed < 0:
        raise UserError(f"--config.data.synthetic.seed={config.seed}: set it to 0 or more")
    images = (config.train_items + config.test_items) * config.views
    check_memory(
        2 * images * config.image_size**2 * 3,  # as drawn, and joined
        available_memory(),
        what=f"--config.data.synthetic of {images:,} images of {config.image_size} pixels a side",
        cure="lower its items, views or image_size",
    )


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a generated set."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name another {DIRECTORY_FLAG}")
    foreign = {entry.name for entry in folder.iterdir()} - {"Img", "Eval", MARK}
    if foreign:
        raise UserError(
            f"{folder} holds {min(foreign)!r}, which was not generated; move it away, or name "
            f"another {DIRECTORY_FLAG}"
        )


def _is_complete(directory: Path, config: SyntheticConfig) -> bool:
    try:
        if (directory / MARK).read_text() != _mark(config):
            return False
        read_in_shop(directory)
    except (OSError, UnicodeDecodeError, UserError):
        return False
    return True


def _mark(config: SyntheticConfig) -> str:
    return json.dumps({"drawing": _DRAWING, **dataclasses.asdict(config)}, indent=1) + "\n"


def _put(new: Path, directory: Path, config: SyntheticConfig, *, old: Path) -> None:
    """Rename the new set into place and an incomplete one to ``old``."""
    if _is_complete(directory, config):  # another process wrote it first; it may be in use
        return
    _check_ours(directory)
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory, old)
    try:
        os.rename(new, directory)
    except OSError:
        if not _is_complete(directory, config):
            raise


def _write(directory: Path, config: SyntheticConfig) -> None:
    tf = import_tensorflow()
    images, garments, photos = synthetic_images(config)
    close = (photos.zoom < 1).reshape(images.shape[:2])
    categories = list(CUTS)
    rows = []
    for item, views in enumerate(images):
        item_id = f"id_{item + 1:08}"
        folder = Path("img", "WOMEN", categories[garments.kind[item]], item_id)
        (directory / "Img" / folder).mkdir(parents=True)
        for view, image in enumerate(views):
            pose = "7_additional" if close[item, view] else "1_front"
            name = folder / f"{view + 1:02}_{pose}.jpg"
            jpeg = tf.io.encode_jpeg(image, quality=_JPEG_QUALITY).numpy()
            (directory / "Img" / name).write_bytes(jpeg)
            split = "train" if item < config.train_items else ("query", "gallery")[view % 2]
            rows.append(f"{name.as_posix()} {item_id} {split}")
    (directory / PARTITION).parent.mkdir()
    (directory / PARTITION).write_text("\n".join([str(len(rows)), HEADER, *rows, ""]))
    (directory / MARK).write_text(_mark(config))
