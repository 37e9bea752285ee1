"""TFDS's own test case over the builder, on a fake download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the builder is TFDS's")
pytest.importorskip("dill", reason="TFDS's test case needs it")

import tensorflow as tf
import tensorflow_datasets as tfds

from mmljax.data.readers import in_shop_builder as in_shop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def write_download(folder: Path) -> None:
    """Two items to train on and two to find, three photographs each, with boxes."""
    random = np.random.default_rng(0)
    rows, boxes = [], []
    for item, test in ((1, False), (2, False), (3, True), (4, True)):
        for view in range(3):
            name = f"img/MEN/Denim/id_{item:08}/01_{view}_front.jpg"
            image = tf.io.encode_jpeg(random.integers(256, size=(24, 20, 3), dtype=np.uint8))
            for images in ("img", "img_highres"):
                path = folder / "Img" / name.replace("img/", f"{images}/", 1)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image.numpy())
            split = ("query", "gallery")[view > 0] if test else "train"
            rows.append(f"{name} id_{item:08} {split}")
            boxes.append(f"{name} 1 1 2 3 18 20")
    for path, header, lines in (
        ("Eval/list_eval_partition.txt", "image_name item_id evaluation_status", rows),
        ("Anno/list_bbox_inshop.txt", "image_name clothes_type pose_type x_1 y_1 x_2 y_2", boxes),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join([str(len(lines)), header, *lines, ""]))


class InShopTest(tfds.testing.DatasetBuilderTestCase):
    """Prepares every variant, reads it back, and checks what TFDS asks of a builder."""

    DATASET_CLASS = in_shop.InShop
    SPLITS = {"train": 6, "query": 2, "gallery": 4}
    BUILDER_CONFIG_NAMES_TO_TEST = ["low", "high", "cropped"]
    SKIP_CHECKSUMS = True  # a manual download has none
    EXAMPLE_DIR = tempfile.mkdtemp(prefix="mmljax-in-shop-")

    @classmethod
    def setUpClass(cls) -> None:
        """Make the download before TFDS looks for it."""
        write_download(Path(cls.EXAMPLE_DIR))
        cls.enterClassContext(mock.patch.object(in_shop.InShop, "check_counts", False))
        super().setUpClass()
