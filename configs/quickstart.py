"""The first run: generated garments, a small network, no download.

    python -m mmljax.main --config configs/quickstart.py

Hardware: two CPU cores, under 3 minutes. Expected Recall@1: see the README's table of results.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """A small network on 64 px images that the run draws itself."""
    config = mmljax.default_config()
    config.duration = "500 steps"
    config.data.source = "synthetic"
    config.data.directory = "data/quickstart"
    config.data.image_size = 64
    config.data.resize_size = 64
    config.data.crop_scale = (0.5, 1.0)
    config.data.batch_size = 64
    config.model.backbone = "small_stride4"
    config.model.width = 32
    config.model.embedding_size = 128
    config.model.compute_dtype = "float32"
    for group in ("backbone", "head"):
        config.optimizer[group].learning_rate = 1e-3
    config.optimizer.warmup = "20 steps"
    config.evaluation.every = "250 steps"
    config.checkpoint.every = "250 steps"
    config.log.every = 20
    return config
