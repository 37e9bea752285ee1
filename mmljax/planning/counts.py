"""Numbers of classes and images of a run, from flags, its data or its benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mmljax.config import Config, choose
from mmljax.data import load
from mmljax.data.readers.in_shop_list import IMAGES, ITEMS
from mmljax.data.readers.tfds import LAYOUTS
from mmljax.errors import UserError


class Counts(NamedTuple):
    """Sizes of a data set; the search is planned only where they are known."""

    classes: int  # of the training split
    images: int  # of the training split
    queries: int = 0  # 0: unknown
    gallery: int = 0  # 0: the queries are searched among themselves
    channels: int = 3


def _zero_shot(name: str) -> Counts:
    (images, classes), (queries, _) = LAYOUTS[name].counts
    return Counts(classes, images, queries)


_IN_SHOP = Counts(ITEMS["train"], *IMAGES.values())
_OF_IN_SHOP = ("in_shop", "in_shop_high")
_OF_IN_SHOP_IN_TFDS = ("tfds_in_shop", "tfds_in_shop_high", "tfds_in_shop_cropped")

PUBLISHED: Mapping[str, Counts] = {
    **dict.fromkeys((*_OF_IN_SHOP, *_OF_IN_SHOP_IN_TFDS), _IN_SHOP),
    "tfds_cub": _zero_shot("caltech_birds2011"),
    "tfds_cars": _zero_shot("cars196"),
    "tfds_sop": _zero_shot("stanford_online_products"),
}
"""Of In-Shop Clothes Retrieval (Liu et al., DeepFashion, CVPR 2016) and the benchmarks of
:mod:`mmljax.data.readers.tfds`, for when they are not here."""


def count(
    config: Config, *, classes: int = 0, images: int = 0, queries: int = 0, gallery: int = 0
) -> Counts:
    """The numbers that flags state, and otherwise those of the config's source.

    Args:
      config: of the run.
      classes: of the training split; 0 where no flag states it. So are the others.
      images: of the training split.
      queries: of the test split.
      gallery: of the test split.

    Raises:
      UserError: if neither flags nor the source tell classes and images.
    """
    source = config.data.source
    if source == load.FEATURES:
        raise UserError(f"--config.data.source={source} trains a head alone; plan a run on images")
    choose(load.SOURCES, source, key="config.data.source")
    found = Counts(classes, images) if classes and images else _of_source(config)
    return found._replace(
        classes=classes or found.classes,
        images=images or found.images,
        queries=queries or found.queries,
        gallery=gallery or found.gallery,
    )


def _of_source(config: Config) -> Counts:
    data = config.data
    if data.source == "synthetic":
        items, half = data.synthetic, data.synthetic.views // 2  # even views are queries
        return Counts(
            items.train_items,
            items.train_items * items.views,
            items.test_items * (items.views - half),
            items.test_items * half,
        )
    try:
        dataset = load.load_dataset(config, create=False)
    except (UserError, ImportError, OSError) as error:
        if data.source in PUBLISHED:
            return PUBLISHED[data.source]
        raise UserError(
            f"--config.data.source={data.source}: its classes and images cannot be counted "
            f"({error}); state them: --classes N --images N"
        ) from error
    return Counts(
        dataset.classes,
        len(dataset.train.labels),
        len(dataset.query.labels),
        len(dataset.gallery.labels) if dataset.gallery else 0,
        load.image_channels(dataset),
    )
