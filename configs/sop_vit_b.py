"""Stanford Online Products with Unicom's ViT-B/16, 224 px, 768 dimensions.

    tfds build stanford_online_products --data_dir data/tfds
    python -m mmljax.main --config configs/sop_vit_b.py --config.model.pretrained=FP16-ViT-B-16.pt

The weights are a release of Unicom's authors (An et al., ICLR 2023, arXiv 2304.05884). AdamW at
1e-5 without weight decay and ten times as much for the head are theirs; batches, duration and
objectives are this project's, and have not been tuned.

Published, not by this project: Recall@1 of 88.8 (Unicom, this network). Ours: not yet measured.
Hardware: a TPU v5e with 8 chips, of which the step takes 5.9 of 16 GiB each (``mmljax plan
--topology v5e:2x4``, 2026-11-28). Its 4,652 steps take at least 134 s and 0.30 chip-hours by the
bounds, up to four times as much is to be expected (``docs/tpu_plans.md``). The encoded images
take 3 GB of host memory on each host.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """59,551 training images of 11,318 products: an epoch is 155 steps."""
    config = mmljax.default_config()
    config.duration = "30 epochs"
    config.data.source = "tfds_sop"
    config.data.directory = "data/tfds"
    config.data.batch_size = 384
    config.data.images_per_class = 2
    config.model.backbone = "unicom_vit_b_16"
    config.model.embedding_size = 768
    config.model.pooling = "token"
    config.proxies_init = "class_means"
    config.optimizer.backbone = {"learning_rate": 1e-5, "weight_decay": 0.0}
    config.optimizer.head = {"learning_rate": 1e-4, "weight_decay": 0.0}
    config.optimizer.freeze_backbone = "1 epochs"
    config.evaluation.recall_at = (1, 10, 100)
    return config
