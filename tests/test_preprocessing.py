"""Images are prepared as the backbone's weights expect, unless the config says otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import torch_networks
from mmljax import config as config_lib
from mmljax.errors import UserError
from mmljax.models.architectures import ARCHITECTURES
from mmljax.models.backbones import BACKBONES
from mmljax.models.embedder import PIXEL_NORMS
from mmljax.preprocessing import RESAMPLINGS, evaluation_resize, preprocessing


def of(**values: Any) -> tuple[int, int, str]:
    mapping = config_lib.default_config()
    for key, value in values.items():
        mapping["model" if key == "backbone" else "data"][key] = value
    data = config_lib.from_mapping(mapping).data
    return data.image_size, data.resize_size, data.resampling


def test_sizes_and_filter_come_with_the_backbone() -> None:
    assert of() == (224, 256, "bilinear")
    assert of(backbone="dinov2_vit_b_14_reg") == (518, 592, "bicubic")
    assert of(backbone="vit_l_14_336_clip") == (336, 384, "bicubic")
    assert of(backbone="vit_b_16_siglip2") == (224, 256, "bilinear")
    assert of(backbone="efficientnet_lite1") == (240, 274, "bilinear")


def test_what_the_config_names_counts() -> None:
    assert of(backbone="dinov2_vit_b_14_reg", image_size=224) == (224, 256, "bicubic")
    clip = {"backbone": "vit_b_16_clip", "resampling": "bilinear", "resize_size": 224}
    assert of(**clip) == (224, 224, "bilinear")
    with pytest.raises(UserError, match=r"--config.data.resampling='bicubik' .*'bicubic'"):
        of(resampling="bicubik")


def test_a_run_keeps_the_numbers_when_its_config_is_read_again() -> None:
    config = config_lib.from_mapping(config_lib.default_config())
    stored = config_lib.to_dict(config)
    assert stored["data"]["image_size"] == 224
    assert config_lib.from_mapping(stored) == config == config_lib.Config()
    model = dataclasses.replace(config.model, backbone="dinov2_vit_b_14")
    assert dataclasses.replace(config, model=model).data == config.data


def test_every_backbone_has_a_size_that_it_takes() -> None:
    for name in BACKBONES:
        size, norm, filter = preprocessing(name)
        assert norm in PIXEL_NORMS
        assert filter in RESAMPLINGS
        assert evaluation_resize(size) >= size
        if name in ARCHITECTURES:
            assert size % ARCHITECTURES[name].patch_size == 0
    assert preprocessing("dinov2_vit_x").image_size == 518


@pytest.mark.parametrize(
    ("backbone", "processor"),
    [
        ("vit_b_16_clip", "CLIPImageProcessor"),
        ("vit_b_16_siglip", "SiglipImageProcessor"),
        ("vit_b_16_siglip2", "Siglip2ImageProcessor"),
        ("dinov3_vit_b_16", "DINOv3ViTImageProcessor"),
    ],
)
def test_filters_and_norms_are_those_of_transformers(backbone: str, processor: str) -> None:
    torch_networks.load_torchvision()
    transformers = pytest.importorskip("transformers", reason=torch_networks.REASON)
    theirs = getattr(transformers, processor)
    _, norm, filter = preprocessing(backbone)
    assert theirs.resample.name.lower() == filter
    mean, deviation = PIXEL_NORMS[norm]
    assert tuple(theirs.image_mean) == pytest.approx(mean)
    assert tuple(theirs.image_std) == pytest.approx(deviation)
