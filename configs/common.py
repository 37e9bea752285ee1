"""Every key of a run with its plain value; the other configs import it and change what differs.

Durations are a number and a unit: ``"600 steps"``, ``"60 epochs"``, ``"5000 examples"`` or, of the
run, ``"10%"``. What each key means stands beside it in ``mmljax/config.py``.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The complete schema; not a run of its own, as it names no data."""
    return ConfigDict(
        {
            "seed": 0,
            "duration": "60 epochs",
            "data": {
                "source": "in_shop",
                "directory": "",
                "check_counts": True,
                "test_share": 0.5,
                "corrupt": "error",
                "image_size": 224,
                "resize_size": 256,
                "crop_scale": (0.16, 1.0),
                "crop_ratio": (3 / 4, 4 / 3),
                "flip": True,
                "rotate": 0.0,
                "shear": 0.0,
                "batch_size": 180,
                "images_per_class": 4,
                "eval_batch_size": 128,
                "threads": 0,
                "prefetch": 4,
                "synthetic": {
                    "train_items": 200,
                    "test_items": 120,
                    "views": 8,
                    "image_size": 64,
                    "seed": 0,
                },
            },
            "model": {
                "backbone": "resnet50",
                "width": 64,
                "pretrained": "",
                "pixel_norm": "imagenet",
                "embedding_size": 512,
                "pooling": "average+max",
                "layer_norm": "before",
                "batch_norm": "global",
                "compute_dtype": "bfloat16",
            },
            "objectives": {
                "pair": objective("multi_similarity", rule="either", margin=0.4),
                "proxy": objective("proxy_anchor"),
                "separation": objective("nearest_proxy"),
            },
            # Hyperparameters of each loss, read where an objective names it.
            "losses": {
                "multi_similarity": {"alpha": 2.0, "beta": 40.0, "base": 0.5},
                "contrastive": {"positive_margin": 1.0, "negative_margin": 0.5},
                "triplet_hard": {"margin": 0.1},
                "triplet_semihard": {"margin": 0.1},
                "triplet_all": {"margin": 0.1},
                "margin": {"margin": 0.2, "beta": 1.2},
                "circle": {"margin": 0.4, "gamma": 80.0},
                "supcon": {"temperature": 0.1},
                "nt_xent": {"temperature": 0.07},
                "smooth_ap": {"temperature": 0.01},
                "proxy_anchor": {"alpha": 32.0, "margin": 0.1},
                "proxy_nca_pp": {"temperature": 1 / 9},
                "normalized_softmax": {"temperature": 0.05},
                "cosface": {"scale": 32.0, "margin": 0.25},
                "arcface": {"scale": 32.0, "margin": 0.25},
                "subcenter_arcface": {"scale": 32.0, "margin": 0.25},
                "soft_triple": {"scale": 20.0, "gamma": 0.1, "margin": 0.01},
                "soft_triple_regularizer": {},
                "nearest_proxy": {"gamma": 32.0, "margin": 0.1},
                "soft_orthogonality": {},
                "hyperspherical_energy": {"power": 2.0},
            },
            "centers": 1,
            "row_block": 0,
            "memory": {"size": 0, "start": "0 steps"},
            "combination": {
                "name": "share",
                "weights": {"pair": 1.0, "proxy": 0.03, "separation": 0.3},
                "embedding_shares": {"pair": 0.8, "proxy": 0.2},
                "proxy_shares": {"proxy": 0.9, "separation": 0.1},
                "cap": 10.0,
                "alpha": 1.5,
                "surgery": "none",
            },
            "optimizer": {
                "name": "adamw",
                "b1": 0.9,
                "b2": 0.999,
                "epsilon": 1e-8,
                "backbone": {"learning_rate": 1e-4, "weight_decay": 1e-4},
                "head": {"learning_rate": 1e-4, "weight_decay": 1e-4},
                "proxies": {"learning_rate": 1e-2, "weight_decay": 0.0},
                "weights": {"learning_rate": 0.05, "weight_decay": 0.0},
                "schedule": "cosine",
                "step_every": "20 epochs",
                "step_factor": 0.25,
                "warmup": "1 epochs",
                "freeze_backbone": "0 steps",
                "clip_norm": 10.0,
            },
            "evaluation": {
                "every": "5 epochs",
                "recall_at": (1, 10, 20, 30, 40, 50),
                "gallery_chunk": 4096,
                "untrained": True,
                "geometry": True,
                "clustering": False,
            },
            "checkpoint": {"every": "1 epochs", "keep_last": 2, "keep_best": 1},
            "log": {
                "every": 50,
                "input_wait_warning": 0.2,
                "tensorboard": True,
                "wandb": False,
                "mlflow": False,
                "plot": True,
            },
        }
    )


def objective(
    loss: str, *, rule: str = "none", margin: float = 0.1, memory: bool = False
) -> ConfigDict:
    """One row of ``objectives``."""
    return ConfigDict(
        {
            "loss": loss,
            "params": {},
            "mining": {"rule": rule, "margin": margin, "blend": 0.5},
            "memory": memory,
            "sampled_proxies": 0,
        }
    )
