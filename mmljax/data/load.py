"""The data set that a config names, and its batches on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jax.sharding import Mesh

from mmljax.config import Config, choose
from mmljax.errors import UserError
from mmljax.mesh import place, process_rows
from mmljax.types import Batch, Dataset, Split


def load_dataset(config: Config) -> Dataset:
    """The data set that ``config.data.source`` names.

    Raises:
      UserError: on an unknown source or data that cannot be used.
    """
    from mmljax.data.readers import folder, in_shop

    def synthetic(directory: str) -> Dataset:
        from mmljax.data.synthetic.dataset import write_synthetic

        write_synthetic(directory, config.data.synthetic)
        return in_shop.read_in_shop(directory)

    def tfds(name: str) -> Callable[[str], Dataset]:
        from mmljax.data.readers.tfds import read_tfds

        return partial(read_tfds, name, check_counts=config.data.check_counts)

    table: dict[str, Callable[[str], Dataset]] = {
        "synthetic": synthetic,
        "in_shop": in_shop.read_in_shop,
        "in_shop_high": partial(in_shop.read_in_shop, images="img_highres"),
        "folder": partial(folder.read_folder, test_share=config.data.test_share),
        "csv": folder.read_csv,
        "tfds_in_shop": tfds("in_shop/low"),
        "tfds_in_shop_high": tfds("in_shop/high"),
        "tfds_in_shop_cropped": tfds("in_shop/cropped"),
        "tfds_cub": tfds("caltech_birds2011"),
        "tfds_cars": tfds("cars196"),
        "tfds_sop": tfds("stanford_online_products"),
        "arrays": in_shop.read_arrays,
    }
    return choose(table, config.data.source, key="config.data.source")(config.data.directory)


def image_channels(dataset: Dataset) -> int:
    """Channels of the images that the pipeline yields."""
    images = dataset.train.images
    return images.shape[-1] if images.ndim == 4 else 3


def _pipeline(split: Split) -> Any:
    """The module that makes batches of a split: of arrays, or of image files."""
    if split.images.ndim == 4:
        from mmljax.data import array_pipeline as arrays

        return arrays
    try:
        from mmljax.data import pipeline
    except ImportError as error:
        raise UserError(
            f"reading image files needs TensorFlow ({error}); pip install 'mmljax[data]', or set "
            "--config.data.source='arrays'"
        ) from error
    return pipeline


def train_batches(dataset: Dataset, config: Config, mesh: Mesh, steps: range) -> Iterator[Batch]:
    """Training batches of the given steps, on the devices."""
    return _pipeline(dataset.train).train_batches(
        dataset.train,
        config=config.data,
        seed=config.seed,
        steps=steps,
        rows=process_rows(config.data.batch_size, key="config.data.batch_size"),
        place=partial(place, mesh=mesh),
    )


def eval_batches(split: Split, config: Config, mesh: Mesh) -> Iterator[Batch]:
    """Every image of a split once, in order, the last batch padded, on the devices."""
    return _pipeline(split).eval_batches(
        split,
        config=config.data,
        rows=process_rows(config.data.eval_batch_size, key="config.data.eval_batch_size"),
        place=partial(place, mesh=mesh),
    )
