"""The data set that a config names, and its batches on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from mmljax.config import Config, DataConfig, choose
from mmljax.data.augmentation import check_channels
from mmljax.data.composition import Neighbors
from mmljax.data.exclusion import without_excluded
from mmljax.data.limits import check_sizes
from mmljax.data.readers.arrays import read_arrays
from mmljax.data.readers.csv import read_csv
from mmljax.data.readers.features import read_features
from mmljax.data.readers.folder import read_folder
from mmljax.data.readers.image_files import list_images
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.tfds import read_tfds
from mmljax.data.sampling import check_batch, class_index
from mmljax.data.synthetic.dataset import read_synthetic, write_synthetic
from mmljax.errors import UserError, require
from mmljax.mesh import place, process_rows
from mmljax.types import Batch, Dataset, Split

Reader = Callable[[DataConfig], Dataset]


def _tfds(name: str) -> Reader:
    return lambda data: read_tfds(name, data.directory, check_counts=data.check_counts)


SOURCES: Mapping[str, Reader] = {
    "synthetic": lambda data: read_synthetic(data.directory, data.synthetic),
    "in_shop": lambda data: read_in_shop(data.directory),
    "in_shop_high": lambda data: read_in_shop(data.directory, images="img_highres"),
    "folder": lambda data: read_folder(data.directory, test_share=data.test_share),
    "csv": lambda data: read_csv(data.directory),
    "arrays": lambda data: read_arrays(data.directory),
    "tfds_in_shop": _tfds("in_shop/low"),
    "tfds_in_shop_high": _tfds("in_shop/high"),
    "tfds_in_shop_cropped": _tfds("in_shop/cropped"),
    "tfds_cub": _tfds("caltech_birds2011"),
    "tfds_cars": _tfds("cars196"),
    "tfds_sop": _tfds("stanford_online_products"),
}
"""The reader of each ``data.source`` of images. No reader writes anything."""

FEATURES = "features"
"""The ``data.source`` of features that a backbone gave before."""


def load_dataset(config: Config, *, create: bool = True) -> Dataset:
    """The data set that ``config.data.source`` names.

    Args:
      config: of the run.
      create: whether the source ``synthetic`` may write its images where they are absent, as
        training does. Commands that only read pass False.

    Raises:
      UserError: on an unknown source, data that cannot be used, or an exclusion list that does not
        fit them.
    """
    data = config.data
    if data.source == FEATURES:
        if data.exclude:
            raise UserError(
                f"--config.data.exclude={data.exclude!r}: features are left out when they are made "
                "(mmljax features with this flag); leave it out here"
            )
        return read_features(config)
    read = choose({**SOURCES, FEATURES: None}, data.source, key="config.data.source")
    if create and data.source == "synthetic":
        write_synthetic(data.directory, data.synthetic)
    return with_distractors(without_excluded(read(data), data.exclude), config)


def with_distractors(dataset: Dataset, config: Config) -> Dataset:
    """The data set with the distractors that ``config.evaluation.distractors`` names, if any.

    Raises:
      UserError: if there is no image, or the data set's images are not in colour.
    """
    path, flag = config.evaluation.distractors, "--config.evaluation.distractors"
    if not path or dataset.distractors is not None:
        return dataset
    if feature_size(dataset) or image_channels(dataset) != 3:
        raise UserError(
            f"{flag}={path}: files are read in colour, but the data set has features or images of "
            f"{image_channels(dataset)} channels; leave it out"
        )
    return dataset._replace(distractors=list_images([path], flag=flag))


def image_channels(dataset: Dataset) -> int:
    """Channels of the images that the pipeline yields."""
    images = dataset.train.images
    return images.shape[-1] if images.ndim == 4 else 3


def feature_size(dataset: Dataset) -> int:
    """Channels of the features that a data set has in place of images; 0 if it has images."""
    images = dataset.train.images
    return images.shape[-1] if images.ndim == 3 else 0


def _pipeline(split: Split) -> Any:
    """The module that makes batches of a split: of features, of arrays, or of image files."""
    if split.images.ndim == 3:
        from mmljax.data import feature_pipeline

        return feature_pipeline
    if split.images.ndim == 4:
        from mmljax.data import array_pipeline as arrays

        return arrays
    purpose = "reading image files (--config.data.source=arrays does not)"
    require("tensorflow", extra="data", purpose=purpose)
    from mmljax.data import pipeline

    return pipeline


def check_batches(dataset: Dataset, config: Config) -> None:
    """Refuse sizes that devices, classes or memory cannot hold, and augmentation without meaning.

    Raises:
      UserError: with the sizes and the cure.
    """
    data = config.data
    if not feature_size(dataset):
        check_sizes(data, processes=jax.process_count())
        check_channels(data, image_channels(dataset))
    process_rows(data.batch_size, key="config.data.batch_size", multiple_of=data.images_per_class)
    process_rows(data.eval_batch_size, key="config.data.eval_batch_size")
    check_batch(
        class_index(dataset.train.labels),
        batch_size=data.batch_size,
        images_per_class=data.images_per_class,
    )


def train_batches(
    dataset: Dataset,
    config: Config,
    mesh: Mesh,
    steps: range,
    *,
    neighbors: Neighbors | None = None,
    skipped: dict[int, int] | None = None,
) -> Iterator[Batch]:
    """Training batches of the given steps, on the devices.

    ``skipped`` receives by step how many images of this process were replaced, being damaged.
    """
    of_files = {"skipped": skipped} if dataset.train.images.ndim == 1 else {}
    return _pipeline(dataset.train).train_batches(
        dataset.train,
        config=config.data,
        seed=config.seed,
        steps=steps,
        rows=process_rows(config.data.batch_size, key="config.data.batch_size"),
        place=partial(place, mesh=mesh),
        neighbors=neighbors,
        **of_files,
    )


def eval_batches(split: Split, config: Config, mesh: Mesh) -> Iterator[Batch]:
    """Every image of a split once, in order, the last batch padded, on the devices."""
    return _pipeline(split).eval_batches(
        split,
        config=config.data,
        rows=process_rows(config.data.eval_batch_size, key="config.data.eval_batch_size"),
        place=partial(place, mesh=mesh),
    )


def ordered_batches(
    split: Split, config: Config, mesh: Mesh, *, view: int, steps: range
) -> Iterator[Batch]:
    """Some of the batches of :func:`eval_batches`; those of a view above 0 of random crops."""
    return _pipeline(split).ordered_batches(
        split,
        config=config.data,
        seed=config.seed,
        view=view,
        steps=steps,
        rows=process_rows(config.data.eval_batch_size, key="config.data.eval_batch_size"),
        place=partial(place, mesh=mesh),
    )
