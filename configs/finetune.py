"""Fine-tune a pretrained network on one's own photographs, on a laptop.

    pip install 'mmljax[data,page,weights]'
    mmljax train --config finetune --config.data.directory=photos

``photos/`` has one folder per item, or ``train/`` and ``test/`` of such folders; for a table of
files: ``--config.data.source=csv --config.data.directory=photos.csv``. Of a folder without a
split, half of the items are held out for the test.

EfficientNet-Lite0 (Tan and Le, 1905.11946) with its ImageNet weights, from a package, at 112 px.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """600 steps of 64 images: about 10 minutes on two CPU cores."""
    config = mmljax.default_config()
    config.duration = "600 steps"
    config.data.source = "folder"
    config.data.directory = "photos"
    config.data.image_size = 112
    config.data.resize_size = 112
    config.data.crop_scale = (0.3, 1.0)
    config.data.batch_size = 64
    config.data.images_per_class = 4
    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "efficientnet_lite0"
    config.model.pooling = "average"
    config.model.embedding_size = 128
    config.model.batch_norm = "frozen"
    config.model.compute_dtype = "float32"
    config.optimizer.backbone.learning_rate = 3e-4
    config.optimizer.head.learning_rate = 1e-3
    config.optimizer.warmup = "50 steps"
    config.evaluation.every = "200 steps"
    config.evaluation.recall_at = (1, 2, 4, 8)
    config.checkpoint.every = "200 steps"
    config.log.every = 10
    return config
