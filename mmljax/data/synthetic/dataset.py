"""The embedded data set: generated photographs of garments, in the layout of In-Shop.

Unlike a benchmark it needs no download and no agreement, and it is small enough for a first run
on a CPU. Light, framing, pose, background and noise differ from photograph to photograph, and
items share colours, cuts and patterns, so neither pixels nor colour histograms tell items apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mmljax.config import SyntheticConfig
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.in_shop_list import HEADER, PARTITION
from mmljax.data.synthetic.drawing import draw
from mmljax.data.synthetic.garments import CUTS, Garments, Photos, make_garments, make_photos
from mmljax.errors import UserError

MARK = "mmljax_synthetic.json"
"""File in a generated directory that tells which config made it."""

_DRAWING = 1  # raised whenever the same config would give other pixels
_BLOCK = 16  # images drawn at once: what fits a processor's cache
_JPEG_QUALITY = 92


def write_synthetic(directory: str | os.PathLike[str], config: SyntheticConfig) -> None:
    """Make sure that the generated set of ``config`` lies in ``directory``.

    A complete set of the same config is kept as it is; one of another config, or one that misses
    files, is made anew. The set is written beside ``directory`` and renamed into place, so an
    interrupted call leaves no half of one, and several processes may call at once. Even views of
    a test item are queries, odd ones its gallery.

    Args:
      directory: absent, empty, or made by an earlier call; ``sources.read_in_shop`` reads it.
      config: how many items and photographs, their size, the seed.

    Raises:
      UserError: if the directory is somebody else's, or the config makes no data set.
    """
    _check(config)
    if not os.fspath(directory):
        raise UserError("--config.data.directory is empty; name one for the generated images")
    directory = Path(os.path.abspath(directory)).resolve()
    if _is_complete(directory, config):
        return
    _check_ours(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as at:
            _write(Path(at, "new"), config)
            _put(Path(at, "new"), directory, config, old=Path(at, "old"))
    except OSError as error:
        raise UserError(
            f"--config.data.directory={str(directory)!r} cannot be written ({error}); name a "
            "directory on a disk with room, in a place that you may write to"
        ) from error


def synthetic_images(
    config: SyntheticConfig,
) -> tuple[UInt8[np.ndarray, "n views size size 3"], Garments, Photos]:
    """The photographs of ``config``, before JPEG.

    Returns:
      Photographs of the training items and then of the test items; the items ``[n]``; what makes
      each photograph, ``[n views]`` flattened.
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


def _check_ours(directory: Path) -> None:
    """Refuse a directory that holds anything but what this module writes."""
    if not directory.exists():
        return
    where = f"--config.data.directory={str(directory)!r}"
    if not directory.is_dir():
        raise UserError(f"{where} is a file; name a directory for the generated images")
    found = {entry.name for entry in directory.iterdir()}
    foreign = found - {"Img", "Eval", MARK} if MARK in found else found
    if foreign:
        raise UserError(
            f"{where} holds {min(foreign)!r}, which the generator did not make; name an absent or "
            "empty directory for the generated images, or read your own with "
            "--config.data.source=in_shop"
        )


def _is_complete(directory: Path, config: SyntheticConfig) -> bool:
    try:
        if (directory / MARK).read_text() != _fingerprint(config):
            return False
        read_in_shop(directory)
    except (OSError, UnicodeDecodeError, UserError):
        return False
    return True


def _fingerprint(config: SyntheticConfig) -> str:
    return json.dumps({"drawing": _DRAWING, **dataclasses.asdict(config)}, indent=1) + "\n"


def _put(new: Path, directory: Path, config: SyntheticConfig, *, old: Path) -> None:
    """Rename the new set into place and what was there to ``old``."""
    if _is_complete(directory, config):  # another process was faster; its set may be in use
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
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
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
    (directory / MARK).write_text(_fingerprint(config))
