"""Cars196 with a ResNet-50, 224 px, 512 dimensions; classes 99 to 196 are unseen.

    pip install scipy pillow && tfds build cars196 --data_dir data/tfds
    python -m mmljax.main --config configs/cars.py --config.model.pretrained=resnet50.safetensors

The settings are those of configs/cub.py (HIER, arXiv 2212.14258, with Proxy-Anchor), but for rates
that are halved every 10 epochs, as in its authors' script. The objectives are this project's.

Published for a ResNet-50 and 512 dimensions, not by this project: Recall@1, 2, 4 of 88.2, 93.0,
95.6 (HIER) and 87.7, 92.7, 95.5 (Proxy-Anchor, its authors' code). Ours: not yet measured.
Hardware: one accelerator with 16 GB, or more of them (batch_size divides over the devices).
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """8,054 training images: an epoch is 45 steps."""
    config = mmljax.default_config("cub")
    config.data.source = "tfds_cars"
    config.optimizer.step_every = "10 epochs"
    return config
