"""Fine-tune a pretrained network on one's own photographs, on a laptop.

    pip install 'mmljax[data,page,weights]'
    mmljax train --config finetune --config.data.directory=photos

``photos/`` has one folder per item, or ``train/`` and ``test/`` of such folders. Of a folder
without these two, half of the items are held out for the test. For a table of files:
``--config.data.source=csv --config.data.directory=photos.csv``. Where most items have two or three
photographs: ``--config.data.images_per_class=2``.

EfficientNet-Lite0 (Tan and Le, 1905.11946) with its ImageNet weights, from a package of the extra
``weights``, at 144 px. BatchNorm stays frozen, rates fall towards the stem, proxies start as class
means and a moving average of the weights is evaluated; docs/choosing.md explains each of these.

Hardware: two CPU cores, under 10 minutes. Scores: see the README's table of results.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """300 steps of 64 images."""
    config = mmljax.default_config()
    config.duration = "300 steps"
    config.data.source = "folder"
    config.data.directory = "photos"
    config.data.image_size = 144
    config.data.resize_size = 144
    config.data.crop_scale = (0.3, 1.0)
    config.data.batch_size = 64
    config.data.images_per_class = 4
    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "efficientnet_lite0"
    config.model.pooling = "average"
    config.model.batch_norm = "frozen"
    config.model.compute_dtype = "float32"
    config.proxies_init = "class_means"
    config.optimizer.backbone.learning_rate = 3e-4
    config.optimizer.head.learning_rate = 1e-3
    config.optimizer.layer_decay = 0.9
    config.optimizer.ema_decay = 0.99
    config.optimizer.warmup = "50 steps"
    config.evaluation.every = "150 steps"
    config.evaluation.recall_at = (1, 2, 4, 8)
    config.checkpoint.every = "100 steps"
    config.log.every = 10
    return config
