"""In-Shop Clothes Retrieval with a ResNet-50, 224 px, 512 dimensions.

    python -m mmljax.main --config configs/inshop.py --config.data.directory=/data/inshop \
      --config.model.pretrained=resnet50.safetensors

``data.directory`` is the folder that holds ``Img/`` and ``Eval/`` of the benchmark (the README
says how to get it). 60 epochs of 25,882 images in batches of 45 x 4, AdamW at 1e-4, proxies at 100
times that, head and proxies alone for 5 epochs: near what Proxy-Anchor (arXiv 2003.13911) and HIER
(arXiv 2212.14258) use. The objectives are this project's.

Published, not by this project: Recall@1, 10, 20 of 92.4, 98.2, 98.8 for a ResNet-50 with 512
dimensions (HIER), 91.5, 98.1, 98.8 for a BN-Inception (Proxy-Anchor). Ours: not yet measured.
Hardware: one accelerator with 16 GB, or more of them (batch_size divides over the devices).
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """The published recipe for one ResNet-50, with this project's objectives."""
    config = mmljax.default_config()
    config.data.directory = "data/inshop"
    config.optimizer.freeze_backbone = "5 epochs"
    return config
