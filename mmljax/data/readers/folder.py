"""Reader of folders with one folder per class, local or in a bucket. No image is decoded."""

from __future__ import annotations

import hashlib
import logging
import os

from mmljax.data import paths as files
from mmljax.data.decoding import SUFFIXES
from mmljax.data.readers.image_files import is_image_name, is_unread_name, warn_left_out
from mmljax.data.readers.splits import (
    DIRECTORY_FLAG,
    GALLERY,
    QUERY,
    TEST,
    TRAIN,
    ListedImage,
    dataset_of_files,
)
from mmljax.errors import UserError
from mmljax.types import Dataset

_log = logging.getLogger(__name__)


def read_folder(directory: str | os.PathLike[str], *, test_share: float) -> Dataset:
    """Images in one folder per class, with or without folders ``train`` and ``test`` above.

    ``DIR/train/CLASS/*`` with ``DIR/test/CLASS/*`` (searched among themselves) or with
    ``DIR/query/CLASS/*`` and ``DIR/gallery/CLASS/*``; or ``DIR/CLASS/*``, of which a share of the
    classes is held out for the test. Files count whose names end as those of images do
    (``decoding.SUFFIXES``); hidden ones do not. Links that lead to no file or folder are left
    out with a warning, and so are pictures whose kind is not read (``decoding.UNREAD``).

    Args:
      directory: DIR, local or remote.
      test_share: share of the classes that is held out where DIR has no ``train``: those whose
        names have the lowest SHA-256, so that the same are held out on every machine.

    Raises:
      UserError: if the layout is another, a folder cannot be listed, a name is not valid UTF-8, a
        class has no image, a class is both in training and in test, or the share leaves either
        without a class.
    """
    where = f"{DIRECTORY_FLAG}={os.fspath(directory)!r}"
    folders = files.folders_in(directory) if os.fspath(directory) else []
    if not folders:
        raise UserError(
            f"{where} holds no folder; it must hold train/CLASS/ and test/CLASS/, or CLASS/"
        )
    if TRAIN in folders:
        classes = _classes_of_splits(directory, folders, where)
        parents = sorted({folder.partition("/")[0] for folder in classes})
    else:
        held_out = _held_out(folders, test_share, where)
        classes = {c: TEST if c in held_out else TRAIN for c in folders}
        parents = [""]
    left_out = [
        files.join(parent, name)
        for parent in parents
        for name in files.list_folder(files.join(directory, parent)).others
        if not name.startswith(".")
    ]
    images = _images(directory, classes, left_out)
    files.check_unicode((image.name for image in images), where=where)
    warn_left_out(_log, where, left_out)
    return dataset_of_files(directory, images)


def _classes_of_splits(
    directory: str | os.PathLike[str], folders: list[str], where: str
) -> dict[str, str]:
    """The class folders ``split/CLASS`` below ``train`` and its test folders, with their split."""
    tests = [split for split in (TEST, QUERY, GALLERY) if split in folders]
    if tests not in ([TEST], [QUERY, GALLERY]):
        raise UserError(
            f"{where} holds train and {', '.join(tests) or 'no test'}; beside train there must be "
            "either test, or query and gallery"
        )
    inside = {split: files.folders_in(files.join(directory, split)) for split in (TRAIN, *tests)}
    for split, names in inside.items():
        if not names:
            raise UserError(f"{where}: {split} holds no folder; it must hold one per class")
        if split != TRAIN and (shared := set(names) & set(inside[TRAIN])):
            raise UserError(
                f"{where}: class {min(shared)} is in {split} and in train; test classes must be "
                "unseen"
            )
    return {f"{split}/{name}": split for split, names in inside.items() for name in names}


def _held_out(classes: list[str], share: float, where: str) -> set[str]:
    files.check_unicode(classes, where=where)
    count = round(share * len(classes))
    if not 0 < count < len(classes):
        raise UserError(
            f"{where} has no folder train, and --config.data.test_share={share:g} of its "
            f"{len(classes)} classes is {count}; set a share that leaves classes on both sides"
        )
    return set(sorted(classes, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def _images(
    root: str | os.PathLike[str], folders: dict[str, str], left_out: list[str]
) -> list[ListedImage]:
    """The images of class folders, each given with its split; a class is named as its folder.

    Image names that lead to no file, and pictures that are not read, are added to ``left_out``.
    """
    listed = files.list_each([files.join(root, folder) for folder in folders])
    images = []
    for (folder, split), listing in zip(folders.items(), listed, strict=True):
        names = [name for name in listing.files if is_image_name(name)]
        left_out += [f"{folder}/{name}" for name in listing.others if is_image_name(name)]
        left_out += [f"{folder}/{name}" for name in listing.files if is_unread_name(name)]
        if not names:
            raise UserError(
                f"{files.join(root, folder)} holds no image; the names of images end in "
                f"{', '.join(SUFFIXES)}"
            )
        label = folder.rpartition("/")[2]
        images += [ListedImage(f"{folder}/{name}", label, split) for name in names]
    return images
