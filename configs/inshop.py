"""In-Shop Clothes Retrieval with a ResNet-50, 224 px, 512 dimensions.

    python -m mmljax.main --config configs/inshop.py --config.data.directory=/data/inshop

``data.directory`` is the folder that holds ``Img/`` and ``Eval/`` of the benchmark (the README
says how to get it). 60 epochs of 25,882 images.

Hardware: one accelerator with 16 GB, or more of them (batch_size divides over the devices).
Expected time and score: not yet measured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The published recipe for one ResNet-50, with this project's objectives."""
    config = common.get_config()
    config.duration = "60 epochs"
    config.data.source = "in_shop"
    config.data.directory = "data/inshop"
    config.data.batch_size = 180
    config.data.images_per_class = 4
    config.optimizer.backbone = {"learning_rate": 1e-4, "weight_decay": 1e-4}
    config.optimizer.head = {"learning_rate": 1e-4, "weight_decay": 1e-4}
    config.optimizer.proxies = {"learning_rate": 1e-2, "weight_decay": 0.0}
    config.optimizer.freeze_backbone = "1 epochs"
    return config
