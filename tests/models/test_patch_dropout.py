"""Patch dropout: the draw, tokens and rotations against a loop, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import rngs
from test_vit_families import small

from mmljax.config import ModelConfig, load_config
from mmljax.errors import UserError
from mmljax.models.attention import rotate
from mmljax.models.embedder import make_embedder
from mmljax.models.patch_dropout import draw_patches, keep_patches
from mmljax.models.positions import rotary_table
from mmljax.models.vit import VisionTransformer


def test_every_set_of_patches_is_as_likely() -> None:
    drawn = np.asarray(
        draw_patches(jax.random.split(jax.random.key(0), 4000), patches=5, share=0.4)
    )
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    assert max(abs(count / 4000 - 0.1) for count in counts.values()) < 0.02


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.5, 4), (0.63, 6), (1.0, 9)])
def test_the_number_is_the_rounded_share(share: float, kept: int) -> None:
    """Halves are rounded to the even number. An example's draw is its own."""
    keys = jax.random.split(jax.random.key(1), 6)
    drawn = draw_patches(keys, patches=9, share=share)
    assert drawn.shape == (6, kept)
    np.testing.assert_array_equal(draw_patches(keys[4:], patches=9, share=share), drawn[4:])


@pytest.mark.parametrize("kind", ["none", "dinov3", "perception"])
def test_tokens_and_rotations_are_those_of_their_places(kind: Any) -> None:
    rotary = rotary_table(kind, 2, 3, 8, 1)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 8, 16)).astype(np.float32)  # two tokens before the patches
    numbers = np.array([[0, 3, 5], [1, 2, 4]])
    kept, rotations = keep_patches(x, rotary, numbers, first=2)
    for i in range(2):
        rows = [0, 1, *(2 + numbers[i])]
        np.testing.assert_array_equal(kept[i], x[i, rows])
        if rotary is not None and rotations is not None:
            heads = x.reshape(2, 8, 2, 8)
            turned = rotate(kept.reshape(2, 5, 2, 8), rotations)
            np.testing.assert_allclose(turned[i], rotate(heads, rotary)[i, rows], rtol=1e-6)


@pytest.mark.parametrize("name", ["vit_s16", "dinov3_vit_s_16"])
def test_only_training_with_keys_leaves_patches_out(name: str) -> None:
    """The network on the kept patches, computed from its parts for one example at a time."""
    kind = small(name)
    model = VisionTransformer(kind, channels=3, dtype=jnp.float32, rngs=rngs())
    side = 3 * kind.patch_size
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    whole = model(images, train=True, keys=keys)
    model.patch_keep = 0.5
    np.testing.assert_array_equal(model(images, train=False), whole)
    found = model(images, train=True, keys=keys)
    assert found.shape == (2, 1 + 4, kind.embed_dim)

    first = kind.class_token + kind.registers
    numbers = np.asarray(draw_patches(keys, patches=9, share=0.5))
    seen: list[Any] = []
    plain = model.blocks[0].run
    model.patch_keep = 1.0
    model.blocks[0].run = lambda x, **options: (seen.append(x), plain(x, **options))[1]
    model(images, train=False)
    rotary = rotary_table(kind.rotary, 3, 3, kind.head_dim, 1)
    model.blocks[0].run = plain
    for i in range(2):
        x = seen[0][i : i + 1, [*range(first), *(first + numbers[i])]]
        own = rotary and rotary._replace(
            cosines=rotary.cosines[numbers[i]], sines=rotary.sines[numbers[i]]
        )
        for block in model.blocks:
            x = block(x, rotary=own)
        wanted = np.delete(np.asarray(model.norm(x))[0], range(1, first), axis=0)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "unicom_vit_b_32"])
def test_networks_that_need_every_patch_are_refused(backbone: str) -> None:
    pooling = "average" if backbone == "resnet18" else "token"
    config = ModelConfig(backbone=backbone, width=8, pooling=pooling, patch_keep=0.5)
    message = f"patch_keep=0.5: --config.model.backbone='{backbone}' cannot .*or --config"
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: make_embedder(config, channels=3, rngs=nnx.Rngs(0)))


def test_share_out_of_range() -> None:
    with pytest.raises(UserError, match="model.patch_keep must be above 0 and at most 1, found 0"):
        load_config("quickstart", ["model.patch_keep=0"])
