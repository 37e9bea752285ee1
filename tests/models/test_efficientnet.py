"""EfficientNet-Lite: its shape against the published one, its features against the original's."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from test_models import embedder, rngs

import torch_networks
from mmljax.errors import UserError
from mmljax.mesh import AXIS, make_mesh
from mmljax.models.backbones import make_backbone
from mmljax.models.efficientnet import EFFICIENTNETS, round_channels
from mmljax.models.pretrained import convert, load_pretrained
from mmljax.models.weight_files import PACKAGED_WEIGHTS, locate, read_weights


def network(
    name: str, *, width: int = 64, channels: int = 3, dtype: DTypeLike = jnp.float32
) -> Any:
    return make_backbone(name, width=width, channels=channels, dtype=dtype, rngs=rngs())


def test_channels_are_rounded_to_eights_and_lose_at_most_a_tenth() -> None:
    wanted = {16 * 1.1: 16, 24 * 1.1: 24, 40 * 1.1: 48, 80 * 1.1: 88, 192 * 1.1: 208}
    wanted |= {2.5: 8, 11: 16}
    assert {x: round_channels(x) for x in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "count", "blocks"),
    [  # of efficientnet_lite_pytorch, less the classifier of 1000 classes
        ("efficientnet_lite0", 4_652_008 - 1_281_000, 16),
        ("efficientnet_lite1", 5_416_680 - 1_281_000, 21),
        ("efficientnet_lite2", 6_092_072 - 1_281_000, 21),
    ],
)
def test_number_of_parameters_is_the_published_one(name: str, count: int, blocks: int) -> None:
    model = nnx.eval_shape(lambda: network(name))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert len(model.blocks) == blocks
    assert model.features == 1280


@pytest.mark.parametrize(("size", "map_size"), [(224, 7), (112, 4), (100, 4), (33, 2)])
def test_feature_map(size: int, map_size: int) -> None:
    model = nnx.eval_shape(lambda: network("efficientnet_lite2", width=8, channels=2))
    x = jax.ShapeDtypeStruct((5, size, size, 2), jnp.float32)
    y = nnx.eval_shape(lambda model, x: model(x, train=False), model, x)
    assert y.shape == (5, map_size, map_size, 160)


@pytest.mark.slow
def test_variance_at_the_start_neither_vanishes_nor_explodes() -> None:
    model = network("efficientnet_lite0", width=16)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    y = jax.jit(lambda x: model(x, train=False))(x)
    assert 0.01 < y.std() < 10


def test_pixels_are_standardised_as_the_weights_ask() -> None:
    weights = {"pretrained": "efficientnet_lite0", "width": 8, "backbone": "efficientnet_lite0"}

    def norm(**changes: Any) -> Any:
        return nnx.eval_shape(lambda: embedder(**changes)).pixel_norm

    assert norm(pixel_norm="auto") == "imagenet"
    assert norm(pixel_norm="auto", **weights) == "efficientnet_lite"
    assert norm(pixel_norm="efficientnet_lite", **weights) == "efficientnet_lite"
    with pytest.raises(UserError, match="pixel_norm='half' does not fit .*'efficientnet_lite'"):
        norm(pixel_norm="half", **weights)


# The original, with the published weights


def published(name: str) -> Any:
    """The original's module and the file of the weights, or the test is skipped."""
    distribution = PACKAGED_WEIGHTS[name].distribution
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is absent; {torch_networks.REASON}")
    torch_networks.load_torch()
    original = pytest.importorskip("efficientnet_lite_pytorch", reason=torch_networks.REASON)
    return original.EfficientNet, locate(name)


def original_network(name: str, size: int) -> Any:
    """Built for that size of image, since the original fixes its padding at construction."""
    torch = torch_networks.load_torch()
    build, path = published(name)
    peer = build.from_name(name.replace("_", "-"), image_size=size, drop_connect_rate=0)
    peer.load_state_dict(torch.load(path, weights_only=True))
    return peer


def features(peer: Any, x: np.ndarray) -> np.ndarray:
    torch = torch_networks.load_torch()
    with torch.no_grad():
        y = peer.extract_features(torch.from_numpy(x).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).numpy()


def pixels(count: int, size: int) -> np.ndarray:
    """Smooth images with noise, from -1 to 1, so that features are far from zero."""
    random = np.random.default_rng(size)
    rates = random.uniform(0.2, 2, (count, 1, 1, 3))
    waves = np.sin(np.linspace(0, 9, size)[:, None, None] * rates)
    return np.clip(waves + random.normal(0, 0.3, (count, size, size, 3)), -1, 1).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_features_equal_the_original(name: str, size: int) -> None:
    peer = original_network(name, size).eval()
    model = network(name)
    load_pretrained(model, name)
    x = pixels(2, size)
    expected = features(peer, x)
    assert expected.max() > 1
    found = jax.jit(lambda x: model(x, train=False))(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_training_equals_the_original() -> None:
    """Features by the batch's statistics, and the new running ones, in float64.

    In float32 the statistics of so few pixels amplify rounding to 2e-3.
    """
    peer = original_network("efficientnet_lite0", 112).train().double()
    x = pixels(8, 112).astype(np.float64)
    with jax.enable_x64(True):
        model = network("efficientnet_lite0", dtype=jnp.float64)
        load_pretrained(model, "efficientnet_lite0")
        nnx.update(model, jax.tree.map(lambda x: x.astype(np.float64), nnx.state(model)))
        graphdef, state = nnx.split(model)

        def local(state: Any, x: Any) -> Any:
            model = nnx.merge(graphdef, state, copy=True)
            return model(x, train=True), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        whole, rows = PartitionSpec(), PartitionSpec(AXIS)
        mesh = make_mesh(jax.devices()[:2])
        run = jax.shard_map(local, mesh=mesh, in_specs=(whole, rows), out_specs=(rows, whole))
        found, statistics = jax.jit(run)(state, x)
    np.testing.assert_allclose(found, features(peer, x), rtol=0, atol=1e-6)
    ours, theirs = statistics["blocks"][15]["bn1"], peer._blocks[15]._bn1
    np.testing.assert_allclose(ours["mean"], theirs.running_mean.numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_every_published_array_is_used_or_named_as_ignored(name: str) -> None:
    _, path = published(name)
    theirs = read_weights(path)
    shapes = {
        ".".join(map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: network(name))))
    }
    found = convert(theirs, shapes, source=name)
    assert found.keys() == shapes.keys()
    ignored = [x for x in theirs if x.startswith("_fc.") or x.endswith("num_batches_tracked")]
    assert len(found) + len(ignored) == len(theirs)
    assert sum(x.size for x in found.values()) + sum(theirs[x].size for x in ignored) == sum(
        x.size for x in theirs.values()
    )
    assert (
        PACKAGED_WEIGHTS[name].file.split("/")[0] not in sys.modules
    )  # found without importing it
