"""What each backbone's published weights expect of images: side, pixel norm and resizing filter.

Sizes and filters are those of the authors' own programs: the image processors of transformers for
CLIP, SigLIP, SigLIP 2 and DINOv3, the repositories for DINO, DINOv2, Unicom and the Perception
Encoder, torchvision for ResNets. EfficientNet-Lite was trained with bicubic resizing; the results
of this project with it are bilinear, and so is it here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

RESAMPLINGS = ("bilinear", "bicubic")
"""Filters by which images are resized, both antialiased; bicubic is Keys's with a = -0.5."""


class Preprocessing(NamedTuple):
    """What the weights of a backbone were trained with."""

    image_size: int = 224  # side of a crop, pixels
    pixel_norm: str = "imagenet"  # a key of models.embedder.PIXEL_NORMS
    resampling: str = "bilinear"  # one of RESAMPLINGS


_FAMILIES = {  # by a pattern of the whole name
    r"efficientnet_lite[0-2]": Preprocessing(),
    r"vit_[sb]16": Preprocessing(224, "imagenet", "bicubic"),
    r"vit_\w+_(open)?clip": Preprocessing(224, "clip", "bicubic"),
    r"vit_\w+_siglip": Preprocessing(224, "half", "bicubic"),
    r"vit_\w+_siglip2": Preprocessing(224, "half", "bilinear"),
    r"dinov2_vit_\w+": Preprocessing(518, "imagenet", "bicubic"),
    r"dinov3_vit_\w+": Preprocessing(256, "imagenet", "bilinear"),
    r"unicom_vit_\w+": Preprocessing(224, "clip", "bicubic"),
    r"pe_core_vit_\w+": Preprocessing(224, "half", "bilinear"),
}
_SIZES = {  # where the name does not tell a size other than that of the family
    "efficientnet_lite1": 240,
    "efficientnet_lite2": 260,
    "vit_l_16_siglip": 256,
    "vit_so400m_16_siglip": 256,
    "vit_b_32_siglip2": 256,
    "vit_l_16_siglip2": 256,
    "vit_so400m_16_siglip2": 256,
    "vit_so400m_14_384_siglip": 378,  # 27 patches of 14; the published network drops six pixels
    "vit_so400m_14_384_siglip2": 378,
    "pe_core_vit_s_16": 384,
    "pe_core_vit_l_14": 336,
    "pe_core_vit_g_14": 448,
}


def preprocessing(backbone: str) -> Preprocessing:
    """What the weights of a backbone expect; 224 px, ``imagenet``, bilinear for any other name.

    >>> preprocessing("vit_l_14_336_clip")
    Preprocessing(image_size=336, pixel_norm='clip', resampling='bicubic')

    Args:
      backbone: a key of ``models.backbones.BACKBONES``.
    """
    found = (value for name, value in _FAMILIES.items() if re.fullmatch(name, backbone))
    family = next(found, Preprocessing())
    told = re.search(r"_(\d{3})(_|$)", backbone)
    size = int(told[1]) if told else family.image_size
    return family._replace(image_size=_SIZES.get(backbone, size))


def evaluation_resize(image_size: int) -> int:
    """Short side before the centre crop: 256 for 224, and in proportion."""
    return round(image_size * 8 / 7)
