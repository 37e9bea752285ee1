"""Drawn garments: what an item is, how a photograph shows it, and the pixels of both together.

An item (``Garments``) is a cut, a fabric and a print. A photograph (``Photos``) is a pose, a
framing, a light, a background and what hides a part. All arrays have one row per image, and all
drawing works on whole blocks of images. Lengths are in units of the figure: ``x`` to the right
from the body's axis, ``y`` downwards, shoulders at -0.78, hips near 0.1; angles in radians;
colours are RGB from 0 to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Rows = Float[np.ndarray, " n"]
Colors = Float[np.ndarray, "n 3"]
Maps = Float[np.ndarray, "n h w"]

SHOULDER = -0.78
CLUTTER = 4


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
    """What makes an item: the same in each of its photographs."""

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
    """What makes a photograph: independent of the item."""

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
    """Draw ``count`` items of all categories in turn; colours and patterns recur among them."""
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
    """Draw the circumstances of ``count`` photographs."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return _floats(random.uniform(low, high, (count, *shape)))

    def waves(amplitude: float) -> np.ndarray:
        return np.concatenate(
            [uniform(0, amplitude, 1), uniform(-14, 14, 2), uniform(0, 2 * np.pi, 1)], axis=1
        )

    def shapes(number: int, low: float, high: float) -> np.ndarray:
        parts = [uniform(-1, 1, number, 2), uniform(low, high, number, 2)]
        return np.concatenate([*parts, uniform(0, 1, number, 1)], axis=2)

    def palette(*shape: int) -> np.ndarray:
        picked = PALETTE[random.integers(len(PALETTE), size=(count, *shape))]
        return np.clip(picked + uniform(-0.12, 0.12, *shape, 3), 0, 1)

    close = random.random(count) < 0.25
    tone = uniform(0.35, 1, 1)
    return Photos(
        worn=random.random(count) < 0.75,
        arms=uniform(0.12, 0.95, 2),
        stride=uniform(0, 0.22),
        bend=uniform(-0.12, 0.12),
        rotation=uniform(-0.22, 0.22),
        shear=uniform(-0.15, 0.15),
        zoom=np.where(close, uniform(0.55, 0.8), uniform(1.05, 1.6)),
        shift=uniform(-0.22, 0.22, 2),
        gain=uniform(0.45, 1.3, 1) * uniform(0.72, 1.28, 3),
        slope=uniform(-0.35, 0.35, 2),
        gamma=uniform(0.75, 1.35),
        folds=waves(0.22),
        skin=tone * _floats([0.95, 0.76, 0.64]),
        other_color=np.repeat(uniform(0.05, 0.95, 1), 3, axis=1),
        ground=palette(2),
        texture=waves(0.2),
        clutter=shapes(CLUTTER, 0.08, 0.5),
        clutter_color=palette(CLUTTER),
        cover=shapes(1, 0.06, 0.3)[:, 0],
        cover_color=palette(),
        noise=uniform(0.005, 0.05),
    )


def draw(
    garments: Garments, photos: Photos, random: np.random.Generator, *, size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """One photograph per row, edges smooth to about a pixel.

    Args:
      garments: the item in each photograph.
      photos: its circumstances.
      random: for the sensor's noise.
      size: side of the images, pixels.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across, down = axis[None, None, :], axis[None, :, None]
    x, y, pixel = _to_figure(across, down, garments, photos, size=size)
    image = _background(across, down, photos, pixel=np.float32(2 / size))
    worn = photos.worn[:, None, None]
    skin, other = _figure(x, y, garments, photos)
    image = _paint(image, photos.skin[:, None, None], _cover(skin, pixel) * worn)
    image = _paint(image, photos.other_color[:, None, None], _cover(other, pixel) * worn)
    distance, band = _cloth(x, y, garments, photos)
    fabric = _fabric(x, y, garments, band=band, pixel=pixel)
    shade = (1 + _waves(x, y, photos.folds)) * (1 - 0.35 * np.exp(np.minimum(distance, 0) / 0.05))
    image = _paint(image, fabric * shade[..., None], _cover(distance, pixel))
    cover = _shape(across, down, photos.cover)
    image = _paint(image, photos.cover_color[:, None, None], _cover(cover, np.float32(2 / size)))
    light = 1 + across * _c(photos.slope[:, 0]) + down * _c(photos.slope[:, 1])
    image = np.clip(image * light[..., None] * photos.gain[:, None, None], 0, 1)
    image = image ** photos.gamma[:, None, None, None]
    image += random.standard_normal(image.shape, np.float32) * photos.noise[:, None, None, None]
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _to_figure(
    across: Maps, down: Maps, garments: Garments, photos: Photos, *, size: int
) -> tuple[Maps, Maps, Maps]:
    """Each pixel's place on the figure, and the size of a pixel there."""
    half = np.maximum((garments.hem - garments.top) / 2, 0.45) * photos.zoom
    across = across + _c(photos.shift[:, 0])
    down = down + _c(photos.shift[:, 1])
    cosine, sine = _c(np.cos(photos.rotation)), _c(np.sin(photos.rotation))
    x = _c(half) * (cosine * across - sine * down)
    y = _c(half) * (sine * across + cosine * down)
    x = x + _c(photos.shear) * y + _c(photos.bend) * y**2
    return x, y + _c((garments.top + garments.hem) / 2), _c(half * 2 / size)


def _cloth(x: Maps, y: Maps, garments: Garments, photos: Photos) -> tuple[Maps, Maps]:
    """Distance from the item's edge, negative inside, and from its nearest hem or cuff."""
    side = np.abs(x)
    top, hem, crotch = _c(garments.top), _c(garments.hem), _c(garments.crotch)
    waist_y = top + 0.6 * (np.minimum(np.minimum(hem, crotch), 0.2) - top)
    flared = np.minimum(hem, crotch)
    above = np.clip((y - top) / (waist_y - top), 0, 1)
    below = np.clip((y - waist_y) / (flared - waist_y), 0, 1)
    waist = _c(garments.waist)
    bottom = np.where(crotch < hem, waist, _c(garments.bottom))
    width = _c(garments.shoulder) + (waist - _c(garments.shoulder)) * above * above
    width = width + (bottom - waist) * below
    edge = top + 0.12 * side * (top < -0.5)
    body = np.maximum(np.maximum(side - width, edge - y), y - flared)

    along = np.clip((y - crotch) / np.maximum(hem - crotch, 0.1), 0, 1)
    center = waist / 2 + _c(photos.stride) * along
    leg = np.abs(side - center) - (waist / 2 + (_c(garments.bottom) - waist / 2) * along)
    body = np.minimum(body, np.maximum(np.maximum(leg, crotch - y), y - hem))

    sleeve, reach, off = _limb(x, y, garments.shoulder - 0.07, garments.top + 0.12, photos.arms)
    length = _c(garments.sleeve)
    off = np.maximum(np.maximum(off - (0.12 - 0.04 * reach), reach - length), -0.1 - reach)
    body = np.where(length > 0, np.minimum(body, off), body)
    hole = _neckline(side, y - top, garments)
    cuff = np.where((length > 0) & (sleeve > 0) & (off < 0.02), length - reach, 9)
    return np.maximum(body, hole), np.minimum(hem - y, cuff)


def _neckline(side: Maps, depth: Maps, garments: Garments) -> Maps:
    """Positive inside the hole for the neck, about a distance."""
    deep = np.maximum(_c(garments.neck), 0.01)
    wide = 0.11 + 0.3 * deep
    pointed = 1 - np.maximum(depth, 0) / deep - side / wide
    rounded = 1 - np.hypot(side / wide, np.maximum(depth, 0) / deep)
    hole = np.where(_c(garments.pointed), pointed, rounded) * deep * 0.7
    return np.where(_c(garments.neck) > 0, hole, -9)


def _limb(
    x: Maps, y: Maps, start_x: Rows, start_y: Rows | float, angles: np.ndarray
) -> tuple[Maps, Maps, Maps]:
    """Which arm's side a pixel is on, how far along the arm, and how far off its axis."""
    angle = np.where(x < 0, _c(angles[:, 0]), _c(angles[:, 1]))
    sine, cosine = np.sin(angle), np.cos(angle)
    right, under = np.abs(x) - _c(start_x), y - _c(np.broadcast_to(start_y, start_x.shape))
    outwards = right * cosine - under * sine
    return right + 0.07, right * sine + under * cosine, np.abs(outwards)


def _figure(x: Maps, y: Maps, garments: Garments, photos: Photos) -> tuple[Maps, Maps]:
    """Distances from the figure's skin and from what it wears besides the item."""
    side = np.abs(x)
    head = (np.hypot(x / 0.13, (y - SHOULDER + 0.24) / 0.17) - 1) * 0.13
    neck = np.maximum(side - 0.07, np.abs(y - SHOULDER + 0.06) - 0.12)
    shoulders = np.full(len(x), 0.27, np.float32)
    _, reach, off = _limb(x, y, shoulders, SHOULDER + 0.1, photos.arms)
    arms = np.maximum(off - 0.065, np.maximum(reach - 0.95, -0.05 - reach))
    along = np.clip((y - 0.2) / 1.6, 0, 1)
    leg = np.abs(side - 0.14 - _c(photos.stride) * along) - 0.13 + 0.07 * along
    legs = np.maximum(leg, np.maximum(0.1 - y, y - 1.9))
    torso = np.maximum(
        side - 0.29 + 0.07 * np.cos(5 * y), np.maximum(SHOULDER + 0.03 - y, y - 0.25)
    )
    skin = np.minimum(np.minimum(np.minimum(head, neck), np.minimum(arms, legs)), torso)
    upper = _c(garments.neck) > 0
    return skin, np.where(upper, np.minimum(legs, np.maximum(torso, -y)), torso)


def _fabric(
    x: Maps, y: Maps, garments: Garments, *, band: Maps, pixel: Maps
) -> Float[np.ndarray, "n h w 3"]:
    """Colours of the cloth before light: pattern, trim, print, buttons."""
    cosine, sine = _c(np.cos(garments.angle)), _c(np.sin(garments.angle))
    frequency, phase = _c(garments.frequency), _c(garments.phase)
    u = frequency * (x * cosine + y * sine) + phase
    v = frequency * (y * cosine - x * sine) + phase
    soft = 1.5 / np.minimum(frequency * pixel, 1.5)  # a sine's step, one pixel wide
    stripes = _step(np.sin(u), soft)
    fraction = np.clip((y - _c(garments.top)) / _c(garments.hem - garments.top), 0, 1)
    patterns = [
        np.zeros_like(stripes),
        stripes,
        (stripes + _step(np.sin(v), soft)) / 2,
        _step(np.sin(u) * np.sin(v) - 0.35, soft),
        fraction,
        _step(fraction - 0.35 - 0.05 * phase, 40),
    ]
    mix = np.choose(garments.pattern[:, None, None], patterns)
    mix = np.where(_c(garments.trim), np.maximum(mix, _cover(band - 0.07, pixel)), mix)
    fabric = _paint(garments.color[:, None, None], garments.second_color[:, None, None], mix)
    print_map = _cover(_motif(x, y, garments), pixel)
    fabric = _paint(fabric, garments.print_color[:, None, None], print_map)
    line = _cover(np.abs(x) - 0.015, pixel) * 0.6 * _c(garments.placket)
    return fabric * (1 - line[..., None])


def _motif(x: Maps, y: Maps, garments: Garments) -> Maps:
    """Distance from the print's edge."""
    size = _c(garments.motif_size)
    x = (x - _c(garments.motif_x)) / size
    y = (y - _c(garments.top + garments.motif_y)) / size
    side, height, radius = np.abs(x), np.abs(y), np.hypot(x, y)
    distances = [
        np.full_like(x, 9),
        radius - 1,
        np.abs(radius - 0.8) - 0.25,
        np.maximum(side, height) - 0.9,
        np.maximum(y - 0.8, 0.9 * side - 0.5 * y - 0.5),
        np.minimum(np.maximum(side - 0.3, height - 1), np.maximum(side - 1, height - 0.3)),
        radius - 0.75 - 0.35 * np.cos(5 * np.arctan2(x, -y)),
        np.maximum(side - 1, np.abs(height - 0.5) - 0.25),
    ]
    return np.choose(garments.motif[:, None, None], distances) * size


def _background(
    across: Maps, down: Maps, photos: Photos, *, pixel: np.float32
) -> Float[np.ndarray, "n h w 3"]:
    top, bottom = photos.ground[:, None, None, 0], photos.ground[:, None, None, 1]
    image = _paint(top, bottom, (down + 1) / 2 + 0 * across)
    image = image * (1 + _waves(across, down, photos.texture))[..., None]
    for index in range(CLUTTER):
        distance = _shape(across, down, photos.clutter[:, index])
        image = _paint(image, photos.clutter_color[:, None, None, index], _cover(distance, pixel))
    return image


def _shape(across: Maps, down: Maps, shape: Float[np.ndarray, "n 5"]) -> Maps:
    """Distance from the edge of a rectangle or an ellipse."""
    x, y, width, height, roundness = (_c(column) for column in shape.T)
    right, under = np.abs(across - x) / width, np.abs(down - y) / height
    measure = np.where(roundness > 0.5, np.hypot(right, under), np.maximum(right, under))
    return (measure - 1) * np.minimum(width, height)


def _waves(x: Maps, y: Maps, waves: Float[np.ndarray, "n 4"]) -> Maps:
    amplitude, along_x, along_y, phase = (_c(column) for column in waves.T)
    return amplitude * np.sin(along_x * x + along_y * y + phase)


def _paint(under: np.ndarray, over: np.ndarray, cover: Maps) -> Float[np.ndarray, "n h w 3"]:
    return under + (over - under) * cover[..., None]


def _cover(distance: Maps, pixel: Maps | np.float32) -> Maps:
    """Share of a pixel that lies inside an edge."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _step(value: Maps, slope: Maps | float) -> Maps:
    return np.clip(0.5 + value * slope, 0, 1)


def _c(rows: np.ndarray) -> Maps:
    """One value per image, ready to meet maps of pixels."""
    return rows[:, None, None]


def _floats(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)
