"""CUB-200-2011 (birds) with a ResNet-50, 224 px, 512 dimensions; classes 101 to 200 are unseen.

    pip install opencv-python-headless && tfds build caltech_birds2011 --data_dir data/tfds
    python -m mmljax.main --config configs/cub.py --config.model.pretrained=resnet50.safetensors

The settings are those of HIER (Kim et al., CVPR 2023, arXiv 2212.14258) with Proxy-Anchor, in its
authors' script: batches of 90 x 2, AdamW at 1e-4 with weight decay 1e-2, rates halved every 5
epochs, BatchNorm frozen; head and proxies train alone for 5 epochs, as Proxy-Anchor's authors do
with a ResNet-50 (arXiv 2003.13911). The objectives are this
project's.

Published for a ResNet-50 and 512 dimensions, not by this project: Recall@1, 2, 4 of 70.1, 79.4,
86.9 (HIER) and 69.9, 79.6, 86.6 (Proxy-Anchor, its authors' code). Ours: not yet measured.
Hardware: one accelerator with 16 GB, or more of them (batch_size divides over the devices).
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """5,864 training images: an epoch is 33 steps."""
    config = mmljax.default_config()
    config.duration = "100 epochs"
    config.data.source = "tfds_cub"
    config.data.directory = "data/tfds"
    config.data.images_per_class = 2
    config.model.batch_norm = "frozen"
    for group in ("backbone", "head"):
        config.optimizer[group] = {"learning_rate": 1e-4, "weight_decay": 1e-2}
    config.optimizer.schedule = "step"
    config.optimizer.step_every = "5 epochs"
    config.optimizer.step_factor = 0.5
    config.optimizer.freeze_backbone = "5 epochs"
    config.evaluation.recall_at = (1, 2, 4, 8)
    config.checkpoint.every = "5 epochs"
    return config
