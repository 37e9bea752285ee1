"""In-Shop Clothes Retrieval with SigLIP 2's ViT-B/16, 224 px, 512 dimensions.

    python -m mmljax.main --config configs/inshop_siglip2_b.py \
      --config.data.directory=/data/inshop \
      --config.model.pretrained=hf:google/siglip2-base-patch16-224@COMMIT

``data.directory`` is as for ``configs/inshop.py``. Networks that were trained on images with texts
are the best start for clothes: LookBench (2026) has a fine-grained Recall@1 of 46.1 for this one
without fine-tuning, and 31.8 for DINOv3's ViT-L. Head and proxies train alone for one epoch, then
everything at 1e-5, which falls by 0.8 from layer to layer towards the pixels. Batches, rates and
duration are this project's choice; they have not been tuned.

Published for In-Shop from other weights of this size, not by this project: Recall@1 of 95.5 for
Unicom's ViT-B/16 (An et al. 2023, arXiv 2304.05884). None is known for SigLIP 2. Ours: not yet
measured. Hardware: a TPU v5e with 8 chips, of which the step takes 5.0 of 16 GiB each (``mmljax
plan --topology v5e:2x4``, 2026-11-28). Its 2,022 steps take at least 53 s and 0.12 chip-hours
by the bounds, up to four times as much is to be expected (``docs/tpu_plans.md``).
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """25,882 training images: an epoch is 67 steps."""
    config = mmljax.default_config()
    config.duration = "30 epochs"
    config.data.directory = "data/inshop"
    config.data.batch_size = 384
    config.data.color_jitter = (0.2, 0.2, 0.2, 0.05)
    config.model.backbone = "vit_b_16_siglip2"
    config.model.pooling = "token"
    config.model.drop_path = 0.1
    config.proxies_init = "class_means"
    config.optimizer.backbone = {"learning_rate": 1e-5, "weight_decay": 1e-2}
    config.optimizer.head = {"learning_rate": 1e-4, "weight_decay": 1e-2}
    config.optimizer.layer_decay = 0.8
    config.optimizer.freeze_backbone = "1 epochs"
    config.optimizer.ema_decay = 0.999
    config.evaluation.recall_at = (1, 10, 20, 30)
    return config
