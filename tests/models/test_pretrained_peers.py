"""Weights of torchvision, timm and Hugging Face: every name has its place, and features agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from test_models import rngs

import torch_networks
from mmljax.mesh import AXIS, make_mesh
from mmljax.models.backbones import make_backbone
from mmljax.models.pretrained import convert, load_pretrained
from torch_networks import LIBRARIES, RESNETS, VITS

pytestmark = pytest.mark.slow

IMAGES = 8


def names_and_shapes(library: str, name: str, directory: Path) -> dict[str, tuple[int, ...]]:
    """What a file of that library's holds; Hugging Face's are not the names that it uses itself."""
    torch = torch_networks.load_torch()
    if library == "transformers":
        safetensors = pytest.importorskip("safetensors", reason=torch_networks.REASON)
        torch_networks.make(library, name).save_pretrained(directory)
        with safetensors.safe_open(directory / "model.safetensors", "numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        state = torch_networks.make(library, name).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", [*RESNETS, *VITS])
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_has_its_place(library: str, name: str, tmp_path: Path) -> None:
    theirs = names_and_shapes(library, name, tmp_path)
    model = nnx.eval_shape(
        lambda: make_backbone(name, width=64, channels=3, dtype=jnp.float32, rngs=rngs())
    )
    ours = {
        ".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    weights = {
        key: np.broadcast_to(np.float32(i), shape)  # of no size in memory
        for i, (key, shape) in enumerate(theirs.items())
    }
    found = convert(weights, ours, source="x")
    assert {key: value.shape for key, value in found.items()} == ours
    used = {float(number) for value in found.values() for number in np.unique(value)}
    left = [key for i, key in enumerate(theirs) if i not in used]
    classifier = [key for key in left if not key.endswith("num_batches_tracked")]
    assert len(classifier) == 2
    assert all(key.startswith(("fc.", "head", "classifier")) for key in classifier)
    norms = sum(key.endswith("running_var") for key in theirs)
    assert len(left) - len(classifier) == norms
    assert len(used) == len(theirs) - len(left)


def write(network: Any, library: str, directory: Path) -> str:
    """The network's weights as its library keeps them."""
    if library == "transformers":
        network.save_pretrained(directory)
        return str(directory / "model.safetensors")
    path = directory / "weights.pth"
    torch_networks.load_torch().save(network.state_dict(), path)
    return str(path)


def loaded(name: str, source: str) -> Any:
    model = make_backbone(name, width=64, channels=3, dtype=jnp.float32, rngs=rngs())
    load_pretrained(model, source)
    return model


def pixels(size: int, count: int = IMAGES) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(count, size, size, 3)).astype(np.float32)


def torch_images(x: np.ndarray) -> Any:
    return torch_networks.load_torch().from_numpy(x).permute(0, 3, 1, 2).contiguous()


def assert_near(found: Any, expected: Any) -> None:
    """To 1e-4 of the largest value."""
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    assert 0.1 < largest < 1e6
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, largest))


def maps(model: Any, x: np.ndarray) -> dict[bool, list[Any]]:
    """Feature maps of the stem and the stages, by running statistics and (True) by the batch's."""
    graphdef, state = nnx.split(model)

    def local(state: Any, x: Any) -> dict[bool, list[Any]]:
        return {
            train: nnx.merge(graphdef, state, copy=True).maps(x, train=train)
            for train in (False, True)
        }

    rows = PartitionSpec(AXIS)
    mesh = make_mesh(jax.devices()[:2])
    run = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    return jax.jit(run)(state, jnp.asarray(x))


def torchvision_maps(network: Any, x: Any) -> list[np.ndarray]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    found = [x]
    for i in range(1, 5):
        found.append(getattr(network, f"layer{i}")(found[-1]))
    return [x.permute(0, 2, 3, 1).numpy() for x in found]


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_equals_torchvision_at_every_stage(name: str, tmp_path: Path) -> None:
    torch = torch_networks.load_torch()
    network = torch_networks.scatter(torch_networks.make("torchvision", name))
    model = loaded(name, write(network, "torchvision", tmp_path))
    for size in (224, 256):
        x = pixels(size)
        ours = maps(model, x)
        for train in (False, True):
            with torch.no_grad():
                theirs = torchvision_maps(network.train(train), torch_images(x))
            assert len(theirs) == len(ours[train]) == 5
            for found, expected in zip(ours[train], theirs, strict=True):
                assert_near(found, expected)
            network.load_state_dict(torch.load(tmp_path / "weights.pth"))  # training moved it


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_hugging_faces(name: str, tmp_path: Path) -> None:
    torch = torch_networks.load_torch()
    network = torch_networks.scatter(torch_networks.make("transformers", name)).eval()
    model = loaded(name, write(network, "transformers", tmp_path))
    x = pixels(224, 2)
    with torch.no_grad():
        theirs = network.resnet(torch_images(x), output_hidden_states=True).hidden_states
    ours = jax.jit(lambda x: model.maps(x, train=False))(x)
    for found, expected in zip(ours, theirs, strict=True):
        assert_near(found, expected.permute(0, 2, 3, 1).numpy())


DEPTHS = (1, 6, 12)


def tokens(model: Any, x: np.ndarray) -> list[Any]:
    """Normalised tokens after a few depths, each from a network that ends there."""
    graphdef, state = nnx.split(model)

    def run(state: Any, x: Any) -> list[Any]:
        found = []
        for depth in DEPTHS:
            network = nnx.merge(graphdef, state)
            network.blocks = nnx.List(network.blocks[:depth])
            found.append(network(x, train=False))
        return found

    return jax.jit(run)(state, jnp.asarray(x))


@pytest.mark.parametrize("name", VITS)
def test_vit_equals_timms_at_both_resolutions(name: str, tmp_path: Path) -> None:
    torch = torch_networks.load_torch()
    network = torch_networks.scatter(torch_networks.make("timm", name)).eval()
    model = loaded(name, write(network, "timm", tmp_path))
    for size in (224, 256):
        x = pixels(size)
        with torch.no_grad():
            theirs = network.get_intermediate_layers(
                torch_images(x), n=[d - 1 for d in DEPTHS], return_prefix_tokens=True, norm=True
            )
        for found, (patches, token) in zip(tokens(model, x), theirs, strict=True):
            assert_near(found, torch.cat([token, patches], dim=1).numpy())


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_vit_equals_the_other_libraries(library: str, tmp_path: Path) -> None:
    torch = torch_networks.load_torch()
    network = torch_networks.scatter(torch_networks.make(library, "vit_s16")).eval()
    model = loaded("vit_s16", write(network, library, tmp_path))
    x = pixels(224, 2)
    with torch.no_grad():
        if library == "transformers":
            expected = network.vit(torch_images(x)).last_hidden_state
        else:
            inner = network._process_input(torch_images(x))
            token = network.class_token.expand(2, -1, -1)
            expected = network.encoder(torch.cat([token, inner], dim=1))
    found = jax.jit(lambda x: model(x, train=False))(x)
    assert_near(found, expected.numpy())
