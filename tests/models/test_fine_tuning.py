"""A fine-tune from a file of weights, from the command line by one override."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from test_models import rngs

import small_runs
from mmljax.models.backbones import make_backbone

pytestmark = pytest.mark.filterwarnings(
    # orbax reads checkpoints without shardings in small_runs.final_state, on purpose
    "ignore:Sharding info not provided when restoring:UserWarning"
)

WIDTH, RATE = 8, 1e-5
ENDINGS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # of theirs in ours, by the number of a kernel's axes


def random_weights(backbone: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights by our names, and the same in torch's axes by torchvision's or timm's names."""
    random = np.random.default_rng(0)
    ours, theirs = {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(backbone)):
        *module, last = map(str, path)
        value = random.normal(0, 0.1, variable.shape).astype(np.float32)
        value = {"scale": 1 + value, "var": 1 + np.abs(value)}.get(last, value)
        ours[".".join(map(str, path))] = value
        name = ".".join([*module, ENDINGS.get(last, last)])
        name = name.replace("patch_embed.", "patch_embed.proj.")
        value = value.transpose(AXES[value.ndim]) if last == "kernel" else value
        theirs[name] = np.ascontiguousarray(value)
    return ours, theirs


@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [
        pytest.param("small", "average+max", marks=pytest.mark.slow),
        pytest.param("resnet18", "average+max", marks=pytest.mark.slow),
        pytest.param("vit_s16", "token", marks=pytest.mark.slow),
    ],
)
def test_weights_arrive_and_are_trained_further(
    backbone: str, pooling: str, tmp_path: Path
) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy", reason="writes the file of weights")
    kind: dict[str, Any] = {"width": WIDTH, "channels": 1, "dtype": np.float32, "rngs": rngs()}
    ours, theirs = random_weights(make_backbone(backbone, **kind))
    numpy_files.save_file(theirs, tmp_path / "weights.safetensors")
    config = small_runs.write_config(
        tmp_path / "small.py",
        small_runs.write_images(tmp_path / "images.npz"),
        duration="3 steps",
        data__image_size=16,
        data__resize_size=16,
        model__backbone=backbone,
        model__width=WIDTH,
        model__pooling=pooling,
        model__batch_norm="frozen",
        optimizer__warmup="0 steps",
        optimizer__backbone__learning_rate=RATE,
        evaluation__untrained=False,
    )
    done = small_runs.run(
        config, tmp_path / "run", f"--config.model.pretrained={tmp_path / 'weights.safetensors'}"
    )
    assert done.returncode == 0, done.stderr
    state = small_runs.final_state(tmp_path / "run")
    moved = {}
    for name, value in ours.items():
        group = "model_state" if name.endswith((".mean", ".var")) else "params.network"
        moved[name] = np.abs(state[f"{group}.backbone.{name}"] - value).max()
    trained = [name for name in moved if not name.endswith((".mean", ".var"))]
    assert trained
    # Adam moves a weight by the rate at most, and a little for float32; frozen statistics stay.
    assert max(moved.values()) < 3.1 * RATE
    assert all(moved[name] == 0 for name in moved if name not in trained)
    assert np.mean([moved[name] > RATE / 2 for name in trained]) > 0.8
