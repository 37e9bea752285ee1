"""Omniglot characters, 28 px grey, self-retrieval on unseen alphabets; images from an array file.

    python -m benchmarks.omniglot --images omniglot_background_56.npz --out data/omniglot.npz
    python -m mmljax.main --config configs/omniglot.py

Hardware: two CPU cores as two devices (JAX_NUM_CPU_DEVICES=2), under 15 minutes.
Expected score: see the README's table of results.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """A small network; every training character is also seen turned by quarters, as other ones."""
    config = mmljax.default_config()
    config.duration = "2800 steps"
    config.data.source = "arrays"
    config.data.directory = "data/omniglot.npz"
    config.data.image_size = 28
    config.data.resize_size = 28
    config.data.crop_scale = (0.7, 1.0)
    config.data.flip = False
    config.data.rotate = 10.0
    config.data.shear = 0.15
    config.data.batch_size = 128
    config.data.eval_batch_size = 512
    config.model.backbone = "small"
    config.model.width = 32
    config.model.embedding_size = 128
    config.model.compute_dtype = "float32"
    for group in ("backbone", "head"):
        config.optimizer[group].learning_rate = 1e-3
    config.optimizer.warmup = "50 steps"
    config.objectives.pair.mining = "none"
    config.objectives.pair.mining_params = {}
    config.evaluation.every = "700 steps"
    config.evaluation.recall_at = (1, 2, 4, 8)
    config.checkpoint.every = "700 steps"
    return config
