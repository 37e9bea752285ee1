"""Data sets that TFDS has prepared, with the zero-shot splits of metric learning.

Song et al., Deep Metric Learning via Lifted Structured Feature Embedding (CVPR 2016, arXiv
1511.06452, section 6): of CUB-200-2011 the first 100 classes train and the other 100 test, of
Cars196 the first 98 and the other 98, of Stanford Online Products the classes of its own two
lists; test images search among themselves. Images stay encoded: in memory, or, where the set was
prepared as ArrayRecord, in their files, each read when a batch needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mmljax.config import choose
from mmljax.data.copies import local_copy
from mmljax.data.paths import is_remote
from mmljax.data.readers.splits import DIRECTORY_FLAG, SPLITS, Part, make_dataset
from mmljax.data.tensorflow_devices import import_tensorflow
from mmljax.errors import UserError
from mmljax.text import one_line
from mmljax.types import Dataset


class _Layout(NamedTuple):
    label: str  # feature that is the class
    name: str  # feature that names an image; "" for none
    splits: tuple[str, ...]
    first_unseen: int  # first test class, where one split holds both; 0 where splits are disjoint
    counts: tuple[tuple[int, int], ...]  # images and classes of each part; () where not checked
    prepare: str  # command that prepares it in a given directory


def _in_shop(variant: str) -> _Layout:
    return _Layout(
        label="label",
        name="name",
        splits=SPLITS,
        first_unseen=0,
        counts=(),  # the builder checks them
        prepare=f"mmljax prepare FOLDER {{}} --variant={variant}",
    )


LAYOUTS = {
    "in_shop/low": _in_shop("low"),
    "in_shop/high": _in_shop("high"),
    "in_shop/cropped": _in_shop("cropped"),
    "caltech_birds2011": _Layout(
        label="label",
        name="image/filename",
        splits=("train+test",),
        first_unseen=100,
        counts=((5_864, 100), (5_924, 100)),
        prepare="tfds build caltech_birds2011 --data_dir {}",
    ),
    "cars196": _Layout(
        label="label",
        name="",  # its ids are those of two lists, and not unique
        splits=("train+test",),
        first_unseen=98,
        counts=((8_054, 98), (8_131, 98)),
        prepare="tfds build cars196 --data_dir {}",
    ),
    "stanford_online_products": _Layout(
        label="class_id",
        name="",
        splits=("train", "test"),
        first_unseen=0,
        counts=((59_551, 11_318), (60_502, 11_316)),
        prepare="tfds build stanford_online_products --data_dir {}",
    ),
}
"""By the name of the data set in TFDS."""


class StoredImages:
    """Encoded images that stay in their files, indexed like a NumPy array of bytes.

    A number gives the bytes of one image; a slice, a mask or an array of numbers gives a part.
    """

    ndim = 1

    def __init__(self, source: Sequence[Any], rows: Int[np.ndarray, " n"]) -> None:
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        if rows.ndim:
            return StoredImages(self._source, rows)
        try:
            return self._source[int(rows)]["image"]
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"image {rows} of an ArrayRecord file cannot be read ({one_line(error)}); prepare "
                "the data set again"
            ) from error


def read_tfds(
    name: str, directory: str | os.PathLike[str], *, check_counts: bool = True
) -> Dataset:
    """A data set that TFDS has prepared; nothing is downloaded or prepared here.

    Args:
      name: ``in_shop/low``, ``in_shop/high``, ``in_shop/cropped``, ``caltech_birds2011``,
        ``cars196`` or ``stanford_online_products``.
      directory: TFDS's ``data_dir``, which holds a folder of that name. At an address, the folder
        is copied to the user's cache first (:func:`mmljax.data.copies.local_copy`).
      check_counts: False for other data in the form of the benchmark.

    Raises:
      UserError: if the builder is unknown or not prepared there, its files are damaged, or the
        numbers of images or classes are not the benchmark's.
    """
    layout = choose(LAYOUTS, name, key="config.data.source")
    prepare = layout.prepare.format(os.fspath(directory) or "DIR")
    with _damage_as_user_error(f"{DIRECTORY_FLAG}={os.fspath(directory)!r}", prepare):
        local = local_copy(os.fspath(directory), name) if is_remote(directory) else directory
        builder = _builder(name, directory, local, prepare)
        parts = [_part(builder, layout, split) for split in layout.splits]
    if layout.first_unseen:
        (whole,) = parts
        seen = whole.labels < layout.first_unseen
        parts = [Part(*(column[rows] for column in whole)) for rows in (seen, ~seen)]
    if check_counts:
        _check_counts(name, directory, layout, parts)
    return make_dataset(*parts)


@contextmanager
def _damage_as_user_error(where: str, prepare: str) -> Iterator[None]:
    """Turn what TFDS, TensorFlow and ArrayRecord raise on damaged files into a ``UserError``."""
    tf = import_tensorflow()
    from google.protobuf.json_format import Error as JsonError  # type: ignore[import-untyped]

    try:
        yield
    except UserError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(tf.errors.OpError, JsonError),
    ) as error:
        raise UserError(
            f"{where}: a file of the prepared data set cannot be read ({one_line(error)}); remove "
            f"it and prepare it again: {prepare}"
        ) from error


def _builder(
    name: str,
    directory: str | os.PathLike[str],
    local: str | os.PathLike[str],
    prepare: str,
) -> Any:
    import tensorflow_datasets as tfds

    builder, _, variant = name.partition("/")
    try:
        return tfds.core.read_only_builder.builder_from_files(
            builder,
            data_dir=os.fspath(local),
            **({"config": variant} if variant else {}),
        )
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"{DIRECTORY_FLAG}={os.fspath(directory)!r} holds no prepared TFDS data set {name!r}; "
            f"prepare it there: {prepare}"
        ) from error


def _part(builder: Any, layout: _Layout, split: str) -> Part:
    import tensorflow_datasets as tfds

    skip = tfds.decode.SkipDecoding()
    images: Any
    rows: Any
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        features = builder.info.features.items()
        pictures = [name for name, kind in features if isinstance(kind, tfds.features.Image)]
        rows = builder.as_data_source(split=split, decoders=dict.fromkeys(pictures, skip))
        images = StoredImages(rows, np.arange(len(rows)))
    else:
        wanted = {"image": True, layout.label: True}
        wanted |= {layout.name: True} if layout.name else {}
        dataset = builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(wanted, {"image": skip}),
            read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
        )
        rows = list(dataset.as_numpy_iterator())
        images = np.empty(len(rows), object)
        images[:] = [row["image"] for row in rows]
    labels, names = [], []
    for number, row in enumerate(rows):
        labels.append(row[layout.label])
        names.append(row[layout.name].decode() if layout.name else f"{split}[{number}]")
    return Part(images, np.array(labels), np.array(names))


def _check_counts(
    name: str, directory: str | os.PathLike[str], layout: _Layout, parts: list[Part]
) -> None:
    for what, part, wanted in zip(("train", "test"), parts, layout.counts, strict=False):
        found = len(part.labels), len(np.unique(part.labels))
        if found != wanted:
            raise UserError(
                f"{DIRECTORY_FLAG}={os.fspath(directory)!r}: {found[0]} {what} images of "
                f"{found[1]} classes, but {name} has {wanted[0]} of {wanted[1]}; prepare it again, "
                "or set --config.data.check_counts=False for other data in its form"
            )
