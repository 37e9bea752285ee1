"""TFDS builder of the In-Shop Clothes Retrieval benchmark, from a manual download.

``prepare`` writes the images' bytes into a few large files, which a network file system or a
bucket serves faster than 52,712 small ones; ``readers.tfds.read_tfds`` reads them.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mmljax.config import choose
from mmljax.data import paths as files
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.in_shop_list import (
    BOXES,
    IMAGES,
    ITEMS,
    Box,
    InShopRow,
    read_in_shop_boxes,
    read_in_shop_list,
)
from mmljax.data.readers.splits import SPLITS
from mmljax.data.tensorflow_devices import import_tensorflow
from mmljax.errors import UserError
from mmljax.text import one_line
from mmljax.types import Split

import_tensorflow()

_JPEG_QUALITY = 95  # of cropped images, which must be encoded again

_WHERE = (
    "request them: https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html; "
    "manual_dir is the folder that holds Eval/list_eval_partition.txt and, unpacked, Img/img/"
)


@dataclasses.dataclass
class InShopVariant(tfds.core.BuilderConfig):
    """Which images of the benchmark; scores of different ones do not compare."""

    images: str = "img"  # folder below Img/
    cropped: bool = False  # to the box of the clothes


class InShop(tfds.core.GeneratorBasedBuilder):
    """Photographs of clothes by item; test items are unseen in training."""

    BUILDER_CONFIGS = [
        InShopVariant(name="low", description="Img/img/: the usual download, 256 px."),
        InShopVariant(name="high", description="Img/img_highres/.", images="img_highres"),
        InShopVariant(
            name="cropped", description="Img/img/ cropped to the annotated boxes.", cropped=True
        ),
    ]

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Splits train, query and gallery; the class is the item id."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The images need an agreement: {_WHERE}"

    # TFDS 4.9.10 looks for this with importlib_resources, which nothing it requires installs.
    code_path = tfds.core.as_path(__file__)

    check_counts = True
    """Whether other numbers of images or items than the benchmark's are an error."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="In-Shop Clothes Retrieval, a benchmark of DeepFashion.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "item_id": tfds.features.Text(),
                    "label": tfds.features.Scalar(dtype=np.int32),
                    "name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html",
            citation="""@inproceedings{liu2016deepfashion,
              author = {Liu, Ziwei and Luo, Ping and Qiu, Shi and Wang, Xiaogang and Tang, Xiaoou},
              title = {{DeepFashion}: Powering Robust Clothes Recognition and Retrieval with Rich
                Annotations},
              booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
              year = {2016}
            }""",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        directory = os.fspath(dl_manager.manual_dir)
        rows = read_in_shop_list(directory)
        if self.check_counts:
            _check_counts(rows, directory)
        variant = self.builder_config
        boxes = read_in_shop_boxes(directory) if variant.cropped else None
        if boxes is not None:
            _check_boxes(rows, boxes, directory)
        items = {row.name: row.item for row in rows}
        dataset = read_in_shop(directory, images=variant.images)
        return {
            split: self._generate_examples(getattr(dataset, split), items, boxes)
            for split in SPLITS
        }

    def _generate_examples(
        self, split: Split, items: dict[str, str], boxes: dict[str, Box] | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, label, name in zip(*split, strict=True):
            key = str(name)
            image = str(path) if boxes is None else _cropped(str(path), boxes[key])
            yield key, {"image": image, "item_id": items[key], "label": label, "name": key}


def prepare(
    manual_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    variant: str = "low",
    check_counts: bool = True,
    file_format: str = "tfrecord",
) -> None:
    """Write the benchmark below ``data_dir``; nothing is written if it exists there already.

    Args:
      manual_dir: the folder that holds ``Img/`` and ``Eval/``, local or remote.
      data_dir: TFDS's directory, later ``--config.data.directory`` of the source ``tfds_in_shop``
        (of ``tfds_in_shop_high`` and ``tfds_in_shop_cropped`` for the other variants).
      variant: ``low`` for the images of ``Img/img/``; ``high`` for those of ``Img/img_highres/``;
        ``cropped`` for those of ``Img/img/`` cropped to their boxes in
        ``Anno/list_bbox_inshop.txt`` and encoded again as JPEG of quality 95, not subsampled.
      check_counts: False for a folder in In-Shop's layout that is not the benchmark.
      file_format: ``tfrecord``, to be held in memory, or ``array_record``, to be read at random
        from its files.

    Raises:
      UserError: as ``read_in_shop`` and ``read_in_shop_boxes``; if the counts are not the
        benchmark's, an image has no box, or ``data_dir`` cannot be written.
    """
    choose({name: name for name in InShop.builder_configs}, variant, key="variant")
    if not files.is_folder(manual_dir):
        raise UserError(f"manual_dir={os.fspath(manual_dir)!r} is not a directory; {_WHERE}")
    try:
        builder = InShop(data_dir=os.fspath(data_dir), config=variant, file_format=file_format)
        builder.check_counts = check_counts
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=os.fspath(manual_dir), try_download_gcs=False
            )
        )
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"data_dir={os.fspath(data_dir)!r} cannot be written ({one_line(error)}); name a "
            "directory on a disk with room, where you may write"
        ) from error


def _check_counts(rows: list[InShopRow], directory: str | os.PathLike[str]) -> None:
    images = Counter(row.split for row in rows)
    items = Counter(split for split, _ in {(row.split, row.item) for row in rows})
    for what, found, wanted in (("images", images, IMAGES), ("items", items, ITEMS)):
        for split in SPLITS:
            if found[split] != wanted[split]:
                raise UserError(
                    f"{os.fspath(directory)}: {found[split]} {what} in {split}, but the benchmark "
                    f"has {wanted[split]}; fetch it again, or pass --no-check-counts for other "
                    "data in its layout"
                )


def _check_boxes(
    rows: list[InShopRow], boxes: dict[str, Box], directory: str | os.PathLike[str]
) -> None:
    for row in rows:
        if row.name not in boxes:
            raise UserError(
                f"{files.join(directory, BOXES)} has no box of image {row.name}; fetch the list "
                "again, or prepare another variant"
            )


def _cropped(path: str, box: Box) -> bytes:
    """A JPEG of the part of an image inside the box.

    Raises:
      UserError: if the image cannot be decoded, or the box is outside of it.
    """
    try:
        image = tf.io.decode_jpeg(files.read(path), channels=3, dct_method="INTEGER_ACCURATE")
    except tf.errors.OpError as error:
        raise UserError(f"image {path} cannot be decoded; fetch it again") from error
    inside = image[box.top : box.bottom, box.left : box.right]
    if not tf.size(inside):
        raise UserError(
            f"image {path}: its box {tuple(box)} is beyond its {image.shape[1]} x "
            f"{image.shape[0]} pixels; the boxes are those of the images of low resolution"
        )
    encoded = tf.io.encode_jpeg(inside, quality=_JPEG_QUALITY, chroma_downsampling=False)
    return encoded.numpy()
