"""Stanford Online Products with a ResNet-50, 224 px, 512 dimensions; 11,316 products are unseen.

    tfds build stanford_online_products --data_dir data/tfds
    python -m mmljax.main --config configs/sop.py --config.model.pretrained=resnet50.safetensors

The settings are those of HIER (Kim et al., CVPR 2023, arXiv 2212.14258) with Proxy-Anchor, in its
authors' script: batches of 90 x 2, AdamW at 6e-4 with weight decay 1e-4, rates times 0.3 every 25
epochs, head and proxies alone for 5 epochs. The objectives are this project's.

Published for a ResNet-50 and 512 dimensions, not by this project: Recall@1, 10, 100 of 80.2, 91.5,
96.6 (HIER) and 80.7, 92.0, 96.7 (ProxyNCA++, 256 px). Ours: not yet measured.
Hardware: one accelerator with 16 GB, or more of them (batch_size divides over the devices). The
encoded images take 3 GB of host memory on each host.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """59,551 training images of 11,318 products: an epoch is 331 steps."""
    config = mmljax.default_config()
    config.duration = "150 epochs"
    config.data.source = "tfds_sop"
    config.data.directory = "data/tfds"
    config.data.images_per_class = 2
    for group in ("backbone", "head"):
        config.optimizer[group] = {"learning_rate": 6e-4, "weight_decay": 1e-4}
    config.optimizer.proxies = {"learning_rate": 6e-2, "weight_decay": 0.0}
    config.optimizer.schedule = "step"
    config.optimizer.step_every = "25 epochs"
    config.optimizer.step_factor = 0.3
    config.optimizer.freeze_backbone = "5 epochs"
    config.evaluation.recall_at = (1, 10, 100)
    return config
