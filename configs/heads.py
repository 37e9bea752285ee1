"""Train a linear head on features of a pretrained network: seconds on a laptop.

    mmljax features --config finetune --config.data.directory=photos --output photos.features
    mmljax train --config heads --config.data.directory=photos.features

The features are those of configs/finetune.py's network. ``mmljax sweep`` trains several seeds and
settings side by side.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """400 steps of 64 images."""
    config = mmljax.default_config("finetune")
    config.duration = "400 steps"
    config.data.source = "features"
    config.data.directory = "photos.features"
    config.optimizer.layer_decay = 1.0  # there are no layers below the head
    config.optimizer.ema_decay = 0.0
    config.proxies_init = "random"
    config.model.embedding_size = 128
    config.optimizer.head = {"learning_rate": 1e-3, "weight_decay": 1e-4}
    config.evaluation.every = "400 steps"
    config.checkpoint.every = "400 steps"
    config.log.every = 50
    return config
