"""TFDS builder of the In-Shop Clothes Retrieval benchmark, from a manual download.

``prepare`` writes the images' bytes into a few large files, which a network file system or a
bucket serves faster than 52,712 small ones; ``sources.read_tfds`` reads them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mmljax.data.in_shop_list import SPLITS, InShopRow, read_in_shop_list
from mmljax.data.sources import read_in_shop
from mmljax.errors import UserError
from mmljax.types import Split

tf.config.set_visible_devices([], "GPU")

IMAGES = {"train": 25_882, "query": 14_218, "gallery": 12_612}
"""Images of each split of the benchmark."""

ITEMS = {"train": 3_997, "query": 3_985, "gallery": 3_985}
"""Items of each split; query and gallery show the same ones."""

_WHERE = (
    "ask for them as https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html says; "
    "manual_dir is the folder that holds Eval/list_eval_partition.txt and, unpacked, Img/img/"
)


class InShop(tfds.core.GeneratorBasedBuilder):
    """Photographs of clothes, by item; test items are unseen in training."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Splits train, query and gallery; the class is the item id."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The images come under an agreement: {_WHERE}"

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
        items = {row.name: row.item for row in rows}
        dataset = read_in_shop(directory)
        return {split: self._generate_examples(getattr(dataset, split), items) for split in SPLITS}

    def _generate_examples(
        self, split: Split, items: dict[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, label, name in zip(*split, strict=True):
            key = str(name)
            yield key, {"image": str(path), "item_id": items[key], "label": label, "name": key}


def prepare(
    manual_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    check_counts: bool = True,
) -> None:
    """Write the benchmark below ``data_dir``; nothing happens if it is there already.

    Args:
      manual_dir: the folder that holds ``Img/`` and ``Eval/``.
      data_dir: TFDS's directory, later ``--config.data.directory`` of the source ``tfds_in_shop``.
      check_counts: False for a folder in In-Shop's layout that is not the benchmark.

    Raises:
      UserError: as ``sources.read_in_shop``, and if the counts are not the benchmark's.
    """
    if not Path(manual_dir).is_dir():
        raise UserError(f"manual_dir={os.fspath(manual_dir)!r} is no directory; {_WHERE}")
    builder = InShop(data_dir=os.fspath(data_dir))
    builder.check_counts = check_counts
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=os.fspath(manual_dir), try_download_gcs=False
        )
    )


def _check_counts(rows: list[InShopRow], directory: str | os.PathLike[str]) -> None:
    images = Counter(row.split for row in rows)
    items = Counter(split for split, _ in {(row.split, row.item) for row in rows})
    for what, found, wanted in (("images", images, IMAGES), ("items", items, ITEMS)):
        for split in SPLITS:
            if found[split] != wanted[split]:
                raise UserError(
                    f"{os.fspath(directory)}: {found[split]} {what} in {split}, but the benchmark "
                    f"has {wanted[split]}; fetch it again, or pass check_counts=False for other "
                    "data in its layout"
                )
