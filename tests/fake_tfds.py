"""Small data sets under the names of TFDS's own, prepared by TFDS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmljax.data.readers.in_shop_builder import InShop

FEATURES: dict[str, dict[str, Any]] = {  # of TFDS's builders, without the image
    "caltech_birds2011": {
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=200),
        "bbox": tfds.features.BBoxFeature(),
    },
    "cars196": {
        "label": tfds.features.ClassLabel(num_classes=196),
        "bbox": tfds.features.BBoxFeature(),
        "id": tfds.features.Text(),
    },
    "stanford_online_products": {
        "class_id": tfds.features.ClassLabel(num_classes=22_634),
        "super_class_id": tfds.features.ClassLabel(names=["bicycle", "toaster"]),
    },
}


def prepare(
    builder_name: str,
    directory: Path,
    classes: Mapping[str, Sequence[int]],
    *,
    views: int = 1,
    size: int = 4,
    file_format: str = "tfrecord",
) -> None:
    """Prepare a data set of noisy grey images, as bright as their class's number modulo 250.

    Args:
      builder_name: a key of ``FEATURES``.
      directory: TFDS's ``data_dir``.
      classes: of the splits ``train`` and ``test``.
      views: images of each class in a split.
      size: of the images, pixels.
      file_format: ``tfrecord`` or ``array_record``.
    """
    features = FEATURES[builder_name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = InShop.code_path
        name = builder_name

        def _info(self) -> tfds.core.DatasetInfo:
            every = {"image": tfds.features.Image(), **features}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(every))

        def _split_generators(self, dl_manager: object) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in classes}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for number in classes[split]:
                for view in range(views):
                    noise = np.random.default_rng([number, view]).integers(0, 2, (size, size, 1))
                    image = np.repeat(number % 250 + noise * (view > 0), 3, axis=-1)
                    name = f"{split}_{number}_{view}.jpg"
                    values = {
                        "image/filename": name,
                        "label": number,
                        "class_id": number,
                        "super_class_id": "bicycle",
                        "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                        "id": name,
                    }
                    row = {feature: values[feature] for feature in features}
                    yield name, {"image": image.astype(np.uint8), **row}

    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    builder = Builder(data_dir=str(directory), file_format=file_format)
    builder.download_and_prepare(download_config=offline)
