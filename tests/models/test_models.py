"""Backbones against torch, BatchNorm over devices against one device, and the embedder's parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mmljax.config import ModelConfig
from mmljax.errors import UserError
from mmljax.mesh import AXIS, make_mesh
from mmljax.models.backbones import make_backbone
from mmljax.models.conv_norm import conv_norm, conv_norm_layers
from mmljax.models.embedder import PIXEL_NORMS, Embedder, Head, make_embedder, normalize_pixels
from mmljax.models.resnet import RESNETS, BasicBlock, Bottleneck, ResNet, Stem

CONFIG = ModelConfig(
    backbone="small",
    width=8,
    pretrained="",
    pixel_norm="imagenet",
    embedding_size=6,
    pooling="average+max",
    layer_norm="none",
    batch_norm="global",
    compute_dtype="float32",
)


def rngs(seed: int = 0) -> nnx.Rngs:
    """Keys of the generator that compiles fastest."""
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


def embedder(*, channels: int = 3, seed: int = 0, **changes: Any) -> Embedder:
    config = dataclasses.replace(CONFIG, **changes)
    return make_embedder(config, channels=channels, rngs=rngs(seed))


def two_stage_embedder(*, frozen: bool = False, dtype: Any = jnp.float32) -> Embedder:
    """The smallest with every kind of layer, its statistics unlike those of a new network."""
    kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs()}
    network = ResNet(BasicBlock, (1, 1), stem=Stem(3, 2, False), width=4, channels=3, **kind)
    config = dataclasses.replace(CONFIG, pooling="average+max", layer_norm="none")
    head = Head(network.features, 6, config=config, rngs=rngs(1))
    model = Embedder(network, head, frozen_batch_norm=frozen, pixel_norm="imagenet", dtype=dtype)
    perturb(model)
    wanted = jnp.promote_types(dtype, jnp.float32)
    nnx.update(model, jax.tree.map(lambda x: x.astype(wanted), nnx.state(model)))
    return model


def backbone(name: str, *, width: int = 4, channels: int = 3, dtype: Any = jnp.float32) -> ResNet:
    return make_backbone(name, width=width, channels=channels, dtype=dtype, rngs=rngs())


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Pixels whose channels and borders differ."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, shape[1])[:, None, None] * np.arange(1, shape[-1] + 1) / shape[-1]
    return (random.integers(0, 120, shape) + 130 * ramp).astype(np.uint8)


def perturb(model: nnx.Module, *, seed: int = 1) -> None:
    """Give scale, shift and running statistics values that differ by channel."""
    random = np.random.default_rng(seed)

    def change(path: Any, x: jax.Array) -> jax.Array:
        name = path[-1]
        draw = random.normal(size=x.shape)
        value = {
            "scale": 1 + 0.2 * draw,
            "bias": 0.2 * draw,
            "mean": 0.3 * draw,
            "var": 0.5 + np.abs(draw),
        }.get(name)
        return x if value is None else jnp.asarray(value, x.dtype)

    flat = nnx.to_flat_state(nnx.state(model))
    for path, variable in flat:
        variable.set_value(change(path, variable[...]))
    nnx.update(model, nnx.from_flat_state(flat))


def run(model: nnx.Module, x: Any, cotangent: Any, *, devices: int) -> tuple[Any, Any, Any]:
    """Output, gradient and new statistics, in the way of the train step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def local(params: Any, rest: Any, x: Any, cotangent: Any) -> tuple[Any, Any, Any]:
        def forward(params: Any) -> tuple[Any, Any]:
            model = nnx.merge(graphdef, params, rest, copy=True)
            y = model(x, train=True)
            return y, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

        y, backward, statistics = jax.vjp(forward, params, has_aux=True)
        return y, backward(cotangent)[0], statistics

    sharded, whole = PartitionSpec(AXIS), PartitionSpec()
    step = jax.shard_map(
        local,
        mesh=make_mesh(jax.devices()[:devices]),
        in_specs=(whole, whole, sharded, sharded),
        out_specs=(sharded, whole, whole),
        check_vma=True,
    )
    pure = nnx.to_pure_dict
    return jax.jit(step)(pure(params), pure(rest), jnp.asarray(x), jnp.asarray(cotangent))


def assert_trees_close(a: Any, b: Any, *, tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )


# Architecture


@pytest.mark.parametrize(
    ("name", "count", "features"),
    [  # torchvision's published counts, less the classifier of 1000 classes
        ("resnet18", 11_689_512 - 513_000, 512),
        ("resnet34", 21_797_672 - 513_000, 512),
        ("resnet50", 25_557_032 - 2_049_000, 2048),
        ("resnet101", 44_549_160 - 2_049_000, 2048),
    ],
)
def test_number_of_parameters_is_torchvisions(name: str, count: int, features: int) -> None:
    model = nnx.eval_shape(lambda: backbone(name, width=64))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert model.features == features


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("small", 28, (4, 4, 16)),
        ("small", 64, (8, 8, 16)),
        ("small_stride4", 64, (4, 4, 16)),
        ("small_stride4", 33, (3, 3, 16)),
        ("resnet18", 65, (3, 3, 32)),
        ("resnet50", 64, (2, 2, 128)),
    ],
)
def test_feature_map(name: str, size: int, shape: tuple[int, ...]) -> None:
    model = nnx.eval_shape(lambda: backbone(name, channels=2))
    x = jax.ShapeDtypeStruct((5, size, size, 2), jnp.float32)
    y = nnx.eval_shape(lambda model, x: model(x, train=False), model, x)
    assert y.shape == (5, *shape)
    assert model.features == shape[-1]


def test_strides() -> None:
    for name, strided in (("resnet18", "conv1"), ("resnet50", "conv2")):
        model = nnx.eval_shape(lambda name=name: backbone(name))
        for stage in ("layer2", "layer3", "layer4"):
            first, second = getattr(model, stage)[:2]
            found = {k: getattr(first, k).strides for k in ("conv1", "conv2")}
            assert {k for k, stride in found.items() if stride == 2} == {strided}
            assert first.downsample[0].strides == 2
            assert second.conv1.strides == second.conv2.strides == 1
            assert not second.downsample
        # A bottleneck widens in its first stage too, without a stride.
        assert len(model.layer1[0].downsample) == (2 if name == "resnet50" else 0)


def test_no_random_state_is_kept() -> None:
    rest = nnx.state(nnx.eval_shape(embedder), nnx.Not(nnx.Param))
    kinds = jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert kinds
    assert all(isinstance(x, nnx.BatchStat) for x in kinds)


# Torch


def torch_resnet(bottleneck: bool, depths: tuple[int, ...], *, width: int) -> Any:
    """The architecture of torchvision, written with torch.nn, of random statistics."""
    torch = pytest.importorskip("torch", reason="the peer of the backbones")
    nn = torch.nn

    def conv(i: int, o: int, kernel: int, stride: int = 1) -> Any:
        return nn.Conv2d(i, o, kernel, stride, padding=kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            outputs = 4 * width if bottleneck else width
            plan = (
                [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
                if bottleneck
                else [(inputs, width, 3, stride), (width, outputs, 3, 1)]
            )
            self.count = len(plan)
            for i, arguments in enumerate(plan, 1):
                setattr(self, f"conv{i}", conv(*arguments))
                setattr(self, f"bn{i}", nn.BatchNorm2d(arguments[1]))
            self.downsample = (
                nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
                if stride != 1 or inputs != outputs
                else nn.Identity()
            )

        def forward(self, x: Any) -> Any:
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.count else y
            return torch.relu(y + self.downsample(x))

    torch.manual_seed(0)
    stem = nn.Sequential()
    stem.add_module("conv1", conv(3, width, 7, 2))
    stem.add_module("bn1", nn.BatchNorm2d(width))
    stem.add_module("relu", nn.ReLU())
    stem.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
    inputs = width
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            blocks.append(Block(inputs, width << i, 2 if i and not j else 1))
            inputs = (width << i) * (4 if bottleneck else 1)
        stem.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return stem.double()


TORCH_NAMES = {"bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def from_torch(model: ResNet, peer: Any) -> None:
    """Copy every weight across; a name or a shape that has no counterpart is an error."""
    weights = {k: v.numpy() for k, v in peer.state_dict().items() if "num_batches" not in k}
    flat = nnx.to_flat_state(nnx.state(model))
    for (*path, leaf), variable in flat:
        value = weights.pop(".".join(map(str, [*path, TORCH_NAMES.get(leaf, "weight")])))
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        assert value.shape == variable.shape
        variable.set_value(jnp.asarray(value))
    assert not weights
    nnx.update(model, nnx.from_flat_state(flat))


def check_against_torch(
    build: Callable[..., ResNet],
    depths: tuple[int, ...],
    *,
    bottleneck: bool,
    width: int,
    size: tuple[int, int],
    batch: int,
) -> None:
    """Features, a gradient and new statistics, in evaluation and in training, in float64."""
    torch = pytest.importorskip("torch", reason="the peer of the backbones")
    peer = torch_resnet(bottleneck, depths, width=width)
    x = np.random.default_rng(0).normal(0.3, 1, (batch, *size, 3))
    with jax.enable_x64(True):
        model = nnx.eval_shape(
            lambda: build(width=width, channels=3, dtype=jnp.float64, rngs=rngs())
        )
        from_torch(model, peer)
        images = torch.from_numpy(channels_first(x))
        norm = peer.layer2[0].bn2

        expected = channels_last(peer.eval()(images))
        y = jax.jit(lambda x: model(x, train=False))(x)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8 * expected.max())

        before = norm.running_var.clone().numpy()
        cotangent = np.random.default_rng(1).normal(size=expected.shape)
        result = peer.train()(images)
        result.backward(torch.from_numpy(channels_first(cotangent)))
        y, gradient, statistics = run(model, x, cotangent, devices=1)
        expected = channels_last(result)
        np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8 * expected.max())
        kernel = peer.conv1.weight.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(
            gradient["conv1"]["kernel"], kernel, rtol=1e-6, atol=1e-8 * np.abs(kernel).max()
        )
        ours = statistics["layer2"][0]["bn2"]
        np.testing.assert_allclose(ours["mean"], norm.running_mean.numpy(), rtol=1e-8)
        # Torch folds in the unbiased variance, n / (n - 1) of ours.
        count = -(-size[0] // 8) * -(-size[1] // 8) * batch
        unbiased = (ours["var"] - 0.9 * before) * count / (count - 1) + 0.9 * before
        np.testing.assert_allclose(unbiased, norm.running_var.numpy(), rtol=1e-8)


def channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def channels_last(x: Any) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_two_stages_equal_torch(block: Any) -> None:
    build = functools.partial(ResNet, block, (1, 2), stem=Stem(7, 2, True))
    bottleneck = block is Bottleneck
    check_against_torch(build, (1, 2), bottleneck=bottleneck, width=4, size=(45, 38), batch=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depths"),
    [("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3)), ("resnet50", (3, 4, 6, 3))],
)
def test_network_equals_torch(name: str, depths: tuple[int, ...]) -> None:
    check_against_torch(
        RESNETS[name], depths, bottleneck=name == "resnet50", width=64, size=(97, 80), batch=2
    )


# Normalisation


def test_eight_devices_equal_one() -> None:
    x, cotangent = noise(16, 20, 20, 3), np.random.default_rng(2).normal(size=(16, 6))
    with jax.enable_x64(True):
        model = two_stage_embedder(dtype=jnp.float64)
        start = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        first_batch_mean = model.backbone.conv1(
            normalize_pixels(jnp.asarray(x), norm=PIXEL_NORMS["imagenet"], dtype=jnp.float64)
        ).mean((0, 1, 2))
        one = run(model, x, cotangent, devices=1)
        eight = run(model, x, cotangent, devices=8)
        assert_trees_close(eight, one, tolerance=1e-9)
        assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {np.dtype("float64")}
        old, new = start["backbone"]["bn1"]["mean"], eight[2]["backbone"]["bn1"]["mean"]
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * first_batch_mean, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["global", "frozen"])
def test_efficientnet_on_eight_devices_equals_one(frozen: str) -> None:
    config = dataclasses.replace(
        CONFIG, backbone="efficientnet_lite0", batch_norm=frozen, compute_dtype="float64"
    )
    x, cotangent = noise(16, 33, 33, 3), np.random.default_rng(2).normal(size=(16, 6))
    with jax.enable_x64(True):
        model = make_embedder(config, channels=3, rngs=rngs())
        one, eight = (run(model, x, cotangent, devices=count) for count in (1, 8))
        assert_trees_close(eight, one, tolerance=1e-9)


def test_frozen_batch_norm() -> None:
    model = two_stage_embedder(frozen=True)
    x, cotangent = noise(8, 20, 20, 3), np.random.default_rng(2).normal(size=(8, 6))
    start = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    y, gradient, statistics = run(model, x, cotangent.astype(np.float32), devices=2)
    assert_trees_close(statistics, start, tolerance=0)
    for module in (gradient["backbone"]["bn1"], gradient["backbone"]["layer2"][0]["bn2"]):
        assert np.abs(module["scale"]).max() > 1e-4
        assert np.abs(module["bias"]).max() > 1e-4
    # Training sees what evaluation sees, and needs no mesh.
    for train in (False, True):
        np.testing.assert_allclose(model(jnp.asarray(x), train=train), y, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"), [(3, 2, 1, 1), (1, 1, 0, 1), (5, 2, "SAME", 3)]
)
def test_folding_leaves_values_and_gradients(
    dtype: Any, tolerance: float, kernel: int, stride: int, padding: Any, groups: int
) -> None:
    """BatchNorm multiplied into the kernel equals BatchNorm after it, in every gradient too."""
    x = np.random.default_rng(0).normal(size=(4, 12, 9, 3)).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        make_conv, make_norm = conv_norm_layers(
            dtype=dtype, rngs=rngs(), momentum=0.9, epsilon=1e-3
        )
        conv = make_conv(3, 6, kernel=kernel, stride=stride, padding=padding, groups=groups)
        model = nnx.List([conv, make_norm(6)])
        perturb(model)
        nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def result(forward: Any) -> Any:
            def at(params: Any, x: Any) -> Any:
                return forward(*nnx.merge(graphdef, params, rest), x)

            y, backward = jax.vjp(at, params, x)
            gradient, at_images = backward(jnp.cos(y))
            return y, nnx.to_pure_dict(gradient), at_images

        expected = result(lambda conv, norm, x: norm(conv(x), use_running_average=True))
        found = result(lambda conv, norm, x: conv_norm(conv, norm, x, train=False))
        assert_trees_close(found, expected, tolerance=tolerance)
        assert np.abs(expected[1][1]["scale"]).max() > 1


def test_folding_rounds_to_bfloat16_after_it() -> None:
    """Kernel and scale that round to 1 each, but not their product, which is what is rounded."""
    kernel, scale = 1 + 2.0**-8, 1 + 2.0**-10
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        make_conv, make_norm = conv_norm_layers(
            dtype=dtype, rngs=rngs(), momentum=0.9, epsilon=1e-5
        )
        conv, norm = make_conv(1, 1, kernel=1), make_norm(1)
        conv.kernel.set_value(jnp.full((1, 1, 1, 1), kernel))
        norm.scale.set_value(jnp.full(1, scale))
        found[dtype] = conv_norm(conv, norm, jnp.ones((1, 1, 1, 1)), train=False)
        assert found[dtype].dtype == dtype
    expected = kernel * scale / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found[jnp.float32].item(), expected, rtol=1e-6)
    assert found[jnp.bfloat16].item() == 1 + 2.0**-7


def test_evaluation_does_not_mix_images() -> None:
    model = two_stage_embedder()
    x = jnp.asarray(noise(4, 20, 20, 3))
    whole = model(x, train=False)
    np.testing.assert_allclose(model(x[1:2], train=False), whole[1:2], atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


# Embedder


def test_bfloat16_reaches_the_backbone_alone() -> None:
    half, full = two_stage_embedder(dtype=jnp.bfloat16), two_stage_embedder()
    x, cotangent = noise(8, 20, 20, 3), np.ones((8, 6), np.float32)
    assert half.backbone(jnp.ones((8, 20, 20, 3)), train=False).dtype == jnp.bfloat16
    y, gradient, statistics = run(half, x, cotangent, devices=2)
    for tree in (y, gradient, statistics):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, atol=1e-6)
    exact, rounded = (model(jnp.asarray(x), train=False) for model in (full, half))
    assert 1e-6 < np.abs(exact - rounded).max() < 0.05


def test_bfloat16_keeps_statistics_in_float32() -> None:
    """The mean of values that bfloat16 cannot tell apart is still right."""
    norm = two_stage_embedder(dtype=jnp.bfloat16).backbone.bn1
    mean = 1 + 2.0**-12 * np.arange(4)  # one bfloat16 number
    norm.mean.set_value(jnp.asarray(mean, jnp.float32))
    norm.var.set_value(jnp.full(4, 2.0**-20 - 1e-5))
    norm.scale.set_value(jnp.full(4, 2.0**-10))
    norm.bias.set_value(jnp.zeros(4))
    y = norm(jnp.full((1, 1, 1, 4), 1.0, jnp.bfloat16), use_running_average=True)
    np.testing.assert_allclose(y.astype(np.float32)[0, 0, 0], 1 - mean, atol=1e-6)


@pytest.mark.parametrize("norm", PIXEL_NORMS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pixels(channels: int, norm: str) -> None:
    x = noise(2, 5, 4, channels)
    values = {
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "half": ([0.5] * 3, [0.5] * 3),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        "efficientnet_lite": ([127 / 255] * 3, [128 / 255] * 3),
    }
    mean, deviation = values[norm] if channels == 3 else ([0.5] * channels, [0.5] * channels)
    expected = np.stack(
        [(x[..., c] / 255 - mean[c]) / deviation[c] for c in range(channels)], axis=-1
    )
    for images in (x, x.astype(np.float32)):
        found = normalize_pixels(jnp.asarray(images), norm=PIXEL_NORMS[norm], dtype=jnp.float32)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grey_images() -> None:
    model = embedder(backbone="small_stride4", channels=1)
    y = model(jnp.asarray(noise(3, 36, 36, 1)), train=False)
    assert y.shape == (3, 6)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, atol=1e-6)


def test_seed_decides_the_parameters() -> None:
    def leaves(seed: int) -> list[Any]:
        model = embedder(seed=seed, backbone="small_stride4", channels=1)
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    first, same, other = leaves(0), leaves(0), leaves(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("backbone", "resnet5", "resnet50"),
        ("pooling", "averag", "average"),
        ("layer_norm", "befor", "before"),
        ("batch_norm", "froze", "frozen"),
        ("pixel_norm", "halve", "half"),
        ("compute_dtype", "bfloat", "bfloat16"),
    ],
)
def test_unknown_names(field: str, value: str, near: str) -> None:
    with pytest.raises(UserError, match=f"--config.model.{field}='{value}'.*{near}"):
        nnx.eval_shape(lambda: embedder(**{field: value}))


def test_float64_without_x64_is_refused() -> None:
    with pytest.raises(UserError, match="compute_dtype=float64 .* JAX_ENABLE_X64=1"):
        nnx.eval_shape(lambda: embedder(compute_dtype="float64"))
