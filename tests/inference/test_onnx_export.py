"""A network as an ONNX file, which onnxruntime alone loads, and what its receipt notices."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saved
from commands import run
from mmljax.config import Config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import embedder
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.mesh import make_mesh
from mmljax.models import backbones, efficientnet, positions, resnet, vit
from mmljax.models import embedder as models_embedder
from mmljax.models.positions import filter_matrix
from mmljax.training.state import make_model
from mmljax.types import Split

pytest.importorskip("onnx", reason="pip install 'mmljax[onnx]' brings onnx")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="pip install 'mmljax[onnx]' brings onnxruntime"
)

from mmljax.inference import onnx_export  # noqa: E402
from mmljax.inference.onnx_graph import to_onnx  # noqa: E402
from mmljax.inference.onnx_operators import OPERATORS  # noqa: E402

CLIP = models_embedder.PIXEL_NORMS["clip"]


pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def exported(saved_run, tmp_path_factory):
    """The folder of an export, and the command's exit code."""
    folder = tmp_path_factory.mktemp("export") / "of the run"
    words = ["--output", folder, "--format=onnx", "--count=20", "--step=3"]
    return folder, run("export", saved_run.folder, *words)


def test_the_receipt_holds(exported):
    folder, code = exported
    receipt = json.loads((folder / "onnx_receipt.json").read_text())
    assert code == 0
    assert receipt["holds"] is True
    assert receipt["largest_difference"].keys() == {"1", "3", "64"}
    assert 0 < max(receipt["largest_difference"].values()) <= 1e-5
    assert receipt["other_neighbors"] == []
    assert {"jax", "onnx", "onnxruntime", "converter", "opset", "weights"} < receipt.keys()
    digest = subprocess.run(
        ["sha256sum", "embedder.onnx"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert receipt["sha256"] == digest.stdout.split()[0]
    assert sorted(os.listdir(folder)) == ["embedder.onnx", "onnx.json", "onnx_receipt.json"]


def test_the_file_gives_the_trainers_embeddings_for_any_number_of_images(saved_run, exported):
    query = load.load_dataset(saved_run.config).query  # stored at the size of the crop
    expected, _ = saved.own_embeddings(saved_run, query, step=3)
    session = onnxruntime.InferenceSession(exported[0] / "embedder.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 12, 12, 1])
    assert (returned.type, returned.shape) == ("tensor(float)", ["batch", 16])
    for count in (1, 7, 24):
        (got,) = session.run(None, {"images": query.images[:count]})
        np.testing.assert_allclose(got, expected[:count], atol=1e-5)


def test_the_lines_that_load_it_run_as_written(exported):
    lines = json.loads((exported[0] / "onnx.json").read_text())["load"]
    assert len(lines) == 5
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(lines)],
        cwd=exported[0],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.strip("[]\n ")) == pytest.approx(1, abs=1e-5)


def test_a_file_that_fails_its_receipt_leaves_the_old_one(
    saved_run, exported, tmp_path, monkeypatch, capsys
):
    (tmp_path / "embedder.onnx").write_bytes(b"old")
    broken = (exported[0] / "embedder.onnx").read_bytes()
    monkeypatch.setattr(onnx_export, "lower", lambda trained: broken)
    words = ["--output", tmp_path, "--format=onnx", "--step=5"]
    assert run("export", saved_run.folder, *words) == 1
    assert os.listdir(tmp_path) == ["embedder.onnx"]
    assert (tmp_path / "embedder.onnx").read_bytes() == b"old"
    assert "parity does NOT hold; no file is written" in capsys.readouterr().out


def test_near_copies_that_swap_are_named_and_others_refused():
    own = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    moved = own.copy()
    moved[0, 1], moved[0, 2] = 9e-6, 9.5e-6  # images 2 and 3 are equally far from image 0
    batches = np.stack([own, own, moved])
    receipt = onnx_export.compare(own, batches, "abcd")
    assert receipt["holds"] is True
    assert ("a", "c", "d") in receipt["near_copies"]
    assert receipt["largest_difference"]["64"] == pytest.approx(9.5e-6, rel=1e-3)
    moved[1], moved[3] = own[3], own[1]
    receipt = onnx_export.compare(own, np.stack([own, own, moved]), "abcd")
    assert receipt["holds"] is False
    assert receipt["other_neighbors"]
    assert onnx_export.compare(own, np.full_like(batches, np.nan), "abcd")["holds"] is False


def test_an_operation_without_an_onnx_form_is_named(saved_run, tmp_path, monkeypatch):
    fewer = {name: form for name, form in OPERATORS.items() if name != "max"}
    monkeypatch.setattr(onnx_export, "OPERATORS", fewer)
    with pytest.raises(UserError, match="operation max has no ONNX form here; use --format=jax"):
        run("export", saved_run.folder, "--output", tmp_path, "--format=onnx", "--step=3")
    assert os.listdir(tmp_path) == []


def test_an_extra_that_is_absent_is_one_line(saved_run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    with pytest.raises(UserError, match=r"--format onnx needs .* pip install 'mmljax\[onnx\]'"):
        run("export", saved_run.folder, "--output", tmp_path, "--format=onnx")


def random_embedder(backbone: str, size: int, **model: object) -> TrainedEmbedder:
    """A narrow network with random weights and statistics, for coloured images."""
    changes = {"backbone": backbone, "width": 16, "embedding_size": 16} | model
    config = Config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    data = dataclasses.replace(
        config.data, image_size=size, resize_size=size, eval_batch_size=64, source="arrays"
    )
    config = dataclasses.replace(config, data=data)
    graphdef, *state = make_model(config.model, seed=0, channels=3, pretrained=False)
    network, model_state = jax.tree.map(partial(saved.noised, noise=0.3, seed=1), state)
    identity = {"embedding_size": 16, "image_size": size, "resize_size": size, "run": "random"}
    trained = TrainedEmbedder(
        config, identity, 3, graphdef, network, model_state, lambda x: x, make_mesh()
    )
    return embedder.in_float32(trained)


def random_images(count: int, size: int) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Split(images, np.arange(count, dtype=np.int32), np.arange(count).astype(str))


KINDS = [  # backbone, pooling, size, another size
    ("small", "gem", 20, 33),
    ("resnet18", "average+max", 33, None),
    ("resnet50", "average", 48, None),
    ("efficientnet_lite0", "max", 33, None),
    ("vit_s16", "token", 224, 48),
    ("vit_b_32_clip", "average", 64, None),
    ("vit_b_16_siglip", "token", 48, None),
    ("dinov2_vit_s_14_reg", "gem", 42, None),
    ("dinov3_vit_splus_16", "token", 48, 32),
    ("pe_core_vit_s_16", "token", 48, 64),
    ("unicom_vit_b_32", "token", 224, None),
]


@pytest.fixture
def shallow(monkeypatch):
    """Two blocks of a ViT, two stages of one block of ResNet-50, one of each of EfficientNet."""
    of_width = vit.Architecture.of_width
    monkeypatch.setattr(
        vit.Architecture,
        "of_width",
        lambda kind, width: dataclasses.replace(of_width(kind, width), depth=2),
    )
    whole = resnet.RESNETS["resnet50"]
    short = partial(whole.func, whole.args[0], (1, 1), **whole.keywords)
    monkeypatch.setitem(backbones.BACKBONES, "resnet50", short)
    few = partial(efficientnet.EfficientNetLite, 1.0, 0.1)
    monkeypatch.setitem(backbones.BACKBONES, "efficientnet_lite0", few)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "pooling", "size", "other"), KINDS)
def test_every_kind_of_backbone(backbone, pooling, size, other, shallow):
    trained = random_embedder(backbone, size, pooling=pooling)
    resized = [embedder.at_image_size(trained, other)] if other else []
    for network in [trained, *resized]:
        split = random_images(12, network.config.data.image_size)
        session = onnxruntime.InferenceSession(onnx_export.lower(network))
        (vectors,) = session.run(None, {"images": split.images})
        own = np.asarray(jax.device_get(network.embed(split.images)))
        receipt = onnx_export.compare(own, np.stack([vectors] * 3), split.names)
        assert receipt["holds"], receipt


@pytest.mark.slow
def test_every_part_of_a_head_of_a_half_precision_run(tmp_path):
    trained = random_embedder(
        "small", 20, head="mlp", head_norm="batch", layer_norm="after", compute_dtype="bfloat16"
    )
    assert onnx_export.export_run(trained, random_images(12, 20), tmp_path)["holds"]


def shifted(primitive: str):
    """An operator of windows whose padding is all before, or all after, the image."""

    def convert(graph, inputs, equation):
        output = OPERATORS[primitive](graph, inputs, equation)
        node = next(n for n in reversed(graph.nodes) if n.op_type in ("Conv", "MaxPool"))
        (pads,) = (a for a in node.attribute if a.name == "pads")
        top, left, bottom, right = pads.ints
        pads.ints[:] = [top + bottom, left + right, 0, 0]
        return output

    return {**OPERATORS, primitive: convert}


def reversed_channels(embed, **rest):
    """``to_onnx`` of a network that takes blue, green and red."""
    return to_onnx(lambda x: embed(jnp.stack([x[..., i] for i in (2, 1, 0)], axis=-1)), **rest)


def other_filter(new, old, kind):
    """``filter_matrix`` of another filter of PyTorch's, as if the two were one."""
    return filter_matrix(new, old, "bicubic")


FAULTS = {  # backbone, size, and what is replaced while the file is made
    "padding of convolutions": (
        *("small", 20),
        (onnx_export, "OPERATORS", shifted("conv_general_dilated")),
    ),
    "padding of max pooling": (
        *("resnet18", 33),
        (onnx_export, "OPERATORS", shifted("reduce_window_max")),
    ),
    "normalisation": ("small", 20, (models_embedder, "PIXEL_NORMS", {"imagenet": CLIP})),
    "channel order": ("small", 20, (onnx_export, "to_onnx", reversed_channels)),
    "resize of positions": ("vit_s16", 48, (positions, "filter_matrix", other_filter)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_receipt_catches(fault, tmp_path, monkeypatch, shallow):
    backbone, size, (module, name, wrong) = FAULTS[fault]
    lower = onnx_export.lower

    def broken(trained):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            return lower(trained)

    monkeypatch.setattr(onnx_export, "lower", broken)
    pooling = "token" if backbone == "vit_s16" else "average"
    trained = random_embedder(backbone, size, pooling=pooling)
    receipt = onnx_export.export_run(trained, random_images(12, size), tmp_path)
    assert receipt["holds"] is False
    assert max(receipt["largest_difference"].values()) > 1e-4
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_another_image_size(saved_run, tmp_path):
    for number, form in enumerate(("onnx", "jax")):
        words = ["--image-size=20", "--step=3", f"--format={form}", "--count=12"]
        assert run("export", saved_run.folder, *words, "--output", tmp_path / str(number)) == 0
    description = json.loads((tmp_path / "0" / "onnx.json").read_text())
    assert (description["image_size"], description["resize_size"]) == (20, 20)


def test_an_image_size_that_the_network_does_not_take():
    trained = random_embedder("vit_s16", 32, pooling="token")
    with pytest.raises(UserError, match="--image-size=40: this ViT takes multiples of 16 pixels"):
        embedder.at_image_size(trained, 40)
