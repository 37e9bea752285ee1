"""Random garments and random photographs of them, as parameters that ``drawing`` draws.

An item (``Garments``) has a cut, a fabric and a print. A photograph (``Photos``) has a pose, a
framing, a light, a background and an occluding shape. All arrays have one row per item or
photograph. Lengths are in units of the figure: ``x`` to the right from the body's axis, ``y``
downwards, shoulders at -0.78, hips near 0.1; angles are in radians; colours are RGB from 0 to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Rows = Float[np.ndarray, " n"]
Colors = Float[np.ndarray, "n 3"]

CLUTTER = 4
"""Shapes in the background of a photograph."""


class Cut(NamedTuple):
    """Ranges from which the cut of an item of one category is drawn, ``(low, high)``."""

    top: tuple[float, float]  # y of the upper edge
    hem: tuple[float, float]  # y of the lower edge
    shoulder: tuple[float, float]  # half widths: at the upper edge
    waist: tuple[float, float]  # between the edges
    bottom: tuple[float, float]  # at the hem, of each leg where there are legs
    sleeve: tuple[float, float]  # length; negative for none
    neck: tuple[float, float]  # depth of the neckline; 0 for none
    crotch: float  # y where the legs part; 9 for none
    placket: float  # share of items with a line of buttons


CUTS = {
    "Tees_Tanks": Cut(
        (-0.79, -0.76), (0.0, 0.32), (0.3, 0.4), (0.27, 0.38), (0.3, 0.46), (-0.1, 0.36),
        (0.06, 0.3), 9, 0.1,
    ),
    "Blouses_Shirts": Cut(
        (-0.8, -0.76), (0.05, 0.4), (0.33, 0.42), (0.26, 0.4), (0.3, 0.5), (0.45, 0.88),
        (0.05, 0.3), 9, 0.5,
    ),
    "Dresses": Cut(
        (-0.79, -0.72), (0.4, 1.1), (0.28, 0.38), (0.2, 0.33), (0.34, 0.75), (-0.4, 0.8),
        (0.08, 0.36), 9, 0.1,
    ),
    "Jackets_Coats": Cut(
        (-0.82, -0.78), (0.15, 0.9), (0.38, 0.46), (0.32, 0.46), (0.36, 0.6), (0.75, 0.95),
        (0.1, 0.45), 9, 0.9,
    ),
    "Skirts": Cut(
        (-0.22, -0.05), (0.35, 1.2), (0.2, 0.26), (0.27, 0.36), (0.28, 0.8), (-1.0, -0.9),
        (0.0, 0.0), 9, 0.1,
    ),
    "Pants": Cut(
        (-0.22, -0.05), (1.0, 1.5), (0.2, 0.27), (0.28, 0.34), (0.07, 0.24), (-1.0, -0.9),
        (0.0, 0.0), 0.3, 0.1,
    ),
    "Shorts": Cut(
        (-0.22, -0.05), (0.42, 0.8), (0.2, 0.28), (0.28, 0.35), (0.13, 0.26), (-1.0, -0.9),
        (0.0, 0.0), 0.3, 0.1,
    ),
}  # fmt: skip

PALETTE = np.array([
    (0.88, 0.87, 0.84), (0.13, 0.13, 0.15), (0.50, 0.50, 0.52), (0.14, 0.22, 0.46),
    (0.36, 0.56, 0.80), (0.72, 0.15, 0.18), (0.90, 0.52, 0.60), (0.88, 0.72, 0.22),
    (0.20, 0.45, 0.28), (0.48, 0.28, 0.52), (0.46, 0.30, 0.18), (0.88, 0.46, 0.18),
], np.float32)  # fmt: skip


class Garments(NamedTuple):
    """Parameters of an item, the same in each of its photographs."""

    kind: Int[np.ndarray, " n"]  # position in CUTS
    top: Rows
    hem: Rows
    shoulder: Rows
    waist: Rows
    bottom: Rows
    sleeve: Rows
    neck: Rows
    crotch: Rows
    placket: Bool[np.ndarray, " n"]
    pointed: Bool[np.ndarray, " n"]  # neckline
    trim: Bool[np.ndarray, " n"]  # a band of the second colour at hem and cuffs
    color: Colors
    second_color: Colors
    print_color: Colors
    pattern: Int[np.ndarray, " n"]  # plain, stripes, checks, dots, gradient, block
    angle: Rows  # of the pattern
    frequency: Rows  # of the pattern, radians per unit
    phase: Rows  # of the pattern
    motif: Int[np.ndarray, " n"]  # none, disc, ring, square, triangle, cross, star, bars
    motif_x: Rows
    motif_y: Rows  # from the upper edge
    motif_size: Rows


class Photos(NamedTuple):
    """Parameters of a photograph, independent of the item."""

    worn: Bool[np.ndarray, " n"]  # by a figure, or lying alone
    arms: Float[np.ndarray, "n 2"]  # angle of each arm from the vertical
    stride: Rows  # how far the legs spread
    bend: Rows  # sideways curve of the body
    rotation: Rows
    shear: Rows
    zoom: Rows  # half the height of the frame, in halves of the item's height
    shift: Float[np.ndarray, "n 2"]  # of the frame's centre, in the frame's halves
    gain: Colors  # of the light, per channel
    slope: Float[np.ndarray, "n 2"]  # of the light across the frame
    gamma: Rows
    folds: Float[np.ndarray, "n 4"]  # of the cloth: amplitude, two frequencies, phase
    skin: Colors
    other_color: Colors  # of what else the figure wears
    ground: Float[np.ndarray, "n 2 3"]  # background at the top and at the bottom
    texture: Float[np.ndarray, "n 4"]  # of the background: as for folds
    clutter: Float[np.ndarray, "n s 5"]  # shapes behind: x, y, half width, half height, roundness
    clutter_color: Float[np.ndarray, "n s 3"]
    cover: Float[np.ndarray, "n 5"]  # shape before the item, as for clutter
    cover_color: Colors
    noise: Rows  # standard deviation


def make_garments(random: np.random.Generator, count: int) -> Garments:
    """Parameters of ``count`` random items, of all categories in turn; some share colours."""
    kind = random.permutation(np.arange(count) % len(CUTS))
    cuts = np.array([cut[:7] for cut in CUTS.values()], np.float32)[kind]  # [n parameters 2]
    low, high = cuts[..., 0], cuts[..., 1]
    top, hem, shoulder, waist, bottom, sleeve, neck = (
        low + (high - low) * random.random(low.shape, np.float32)
    ).T
    lower = neck == 0
    colors = random.permuted(np.tile(np.arange(len(PALETTE)), (count, 1)), axis=1)[:, :3]
    tints = PALETTE[colors] + random.uniform(-0.05, 0.05, (count, 3, 3))
    angles = np.array([0, np.pi / 2, np.pi / 4, -np.pi / 4])
    return Garments(
        kind=kind,
        top=top,
        hem=hem,
        shoulder=shoulder,
        waist=waist,
        bottom=bottom,
        sleeve=sleeve,
        neck=neck,
        crotch=_floats([cut.crotch for cut in CUTS.values()])[kind],
        placket=random.random(count) < _floats([cut.placket for cut in CUTS.values()])[kind],
        pointed=random.random(count) < 0.5,
        trim=random.random(count) < 0.3,
        color=_floats(tints[:, 0]),
        second_color=_floats(tints[:, 1]),
        print_color=_floats(tints[:, 2]),
        pattern=random.choice(6, count, p=[0.25, 0.25, 0.15, 0.15, 0.1, 0.1]),
        angle=_floats(random.choice(angles, count)),
        frequency=_floats(random.uniform(11, 26, count)),
        phase=_floats(random.uniform(0, 2 * np.pi, count)),
        motif=random.choice(8, count, p=[0.44] + [0.08] * 7),
        motif_x=_floats(random.uniform(-0.14, 0.14, count) + np.where(lower, 0.1, 0)),
        motif_y=_floats(random.uniform(0.22, 0.5, count)),
        motif_size=_floats(random.uniform(0.09, 0.17, count)),
    )


def make_photos(random: np.random.Generator, count: int) -> Photos:
    """Parameters of ``count`` random photographs."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return _floats(random.uniform(low, high, (count, *shape)))

    def waves(amplitude: float) -> np.ndarray:
        return np.concatenate(
            [uniform(0.0, amplitude, 1), uniform(-14.0, 14.0, 2), uniform(0.0, 2 * np.pi, 1)],
            axis=1,
        )

    def shapes(number: int, low: float, high: float) -> np.ndarray:
        parts = [uniform(-1.0, 1.0, number, 2), uniform(low, high, number, 2)]
        return np.concatenate([*parts, uniform(0.0, 1.0, number, 1)], axis=2)

    def palette(*shape: int) -> np.ndarray:
        picked = PALETTE[random.integers(len(PALETTE), size=(count, *shape))]
        return np.clip(picked + uniform(-0.12, 0.12, *shape, 3), 0, 1)

    close = random.random(count) < 0.2
    tone = uniform(0.35, 1.0, 1)
    return Photos(
        worn=random.random(count) < 0.75,
        arms=uniform(0.12, 0.95, 2),
        stride=uniform(0.0, 0.22),
        bend=uniform(-0.08, 0.08),
        rotation=uniform(-0.16, 0.16),
        shear=uniform(-0.1, 0.1),
        zoom=np.where(close, uniform(0.6, 0.85), uniform(1.05, 1.35)),
        shift=uniform(-0.18, 0.18, 2),
        gain=uniform(0.58, 1.2, 1) * uniform(0.81, 1.19, 3),
        slope=uniform(-0.25, 0.25, 2),
        gamma=uniform(0.8, 1.25),
        folds=waves(0.16),
        skin=tone * _floats([0.95, 0.76, 0.64]),
        other_color=np.repeat(uniform(0.05, 0.95, 1), 3, axis=1),
        ground=palette(2),
        texture=waves(0.2),
        clutter=shapes(CLUTTER, 0.06, 0.4),
        clutter_color=palette(CLUTTER),
        cover=shapes(1, 0.05, 0.2)[:, 0],
        cover_color=palette(),
        noise=uniform(0.005, 0.03),
    )


def _floats(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)
