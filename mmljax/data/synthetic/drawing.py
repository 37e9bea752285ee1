"""The pixels of photographed garments, drawn with NumPy for a whole block of images at once.

Every outline is a map of signed distances (negative inside, nearly exact at the edge), so edges are
smooth within a pixel at any scale. Maps are ``[n h w]``; images ``[n 3 h w]`` until they are
finished.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from mmljax.data.synthetic.garments import CLUTTER, Colors, Garments, Photos, Rows

Maps = Float[np.ndarray, "#n #h #w"]
Images = Float[np.ndarray, "#n 3 #h #w"]

SHOULDER = -0.78
"""Height of the figure's shoulders."""


def draw(
    garments: Garments, photos: Photos, random: np.random.Generator, *, size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """One photograph per row, with edges smooth within about a pixel.

    Args:
      garments: the item in each photograph.
      photos: the parameters of the photograph.
      random: for the sensor's noise.
      size: side of the images, pixels.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across, down = axis[None, None, :], axis[None, :, None]
    x, y, pixel = _to_figure(across, down, garments, photos, size=size)
    image = _background(across, down, photos, pixel=np.float32(2 / size))
    worn = _each(photos.worn)
    skin, other = _figure(x, y, garments, photos)
    image = _paint(image, _rgb(photos.skin), _cover(skin, pixel) * worn)
    image = _paint(image, _rgb(photos.other_color), _cover(other, pixel) * worn)
    distance, band = _cloth(x, y, garments, photos)
    fabric = _fabric(x, y, garments, band=band, pixel=pixel)
    shade = (1 + _waves(x, y, photos.folds)) * (1 - 0.35 * np.exp(np.minimum(distance, 0) / 0.05))
    image = _paint(image, fabric * shade[:, None], _cover(distance, pixel))
    cover = _shape(across, down, photos.cover)
    image = _paint(image, _rgb(photos.cover_color), _cover(cover, np.float32(2 / size)))
    light = 1 + across * _each(photos.slope[:, 0]) + down * _each(photos.slope[:, 1])
    image = np.clip(image * light[:, None] * _rgb(photos.gain), 0, 1)
    image = image ** _each(photos.gamma)[:, None]
    image += random.standard_normal(image.shape, np.float32) * _each(photos.noise)[:, None]
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _to_figure(
    across: Maps, down: Maps, garments: Garments, photos: Photos, *, size: int
) -> tuple[Maps, Maps, Maps]:
    """The position of each pixel on the figure, and the size of a pixel there."""
    half = np.maximum((garments.hem - garments.top) / 2, 0.45) * photos.zoom
    across = across + _each(photos.shift[:, 0])
    down = down + _each(photos.shift[:, 1])
    cosine, sine = _each(np.cos(photos.rotation)), _each(np.sin(photos.rotation))
    x = _each(half) * (cosine * across - sine * down)
    y = _each(half) * (sine * across + cosine * down)
    x = x + _each(photos.shear) * y + _each(photos.bend) * y**2
    return x, y + _each((garments.top + garments.hem) / 2), _each(half * 2 / size)


def _cloth(x: Maps, y: Maps, garments: Garments, photos: Photos) -> tuple[Maps, Maps]:
    """Distance from the item's edge, negative inside, and from its nearest hem or cuff."""
    side = np.abs(x)
    top, hem, crotch = _each(garments.top), _each(garments.hem), _each(garments.crotch)
    waist_y = top + 0.6 * (np.minimum(np.minimum(hem, crotch), 0.2) - top)
    flared = np.minimum(hem, crotch)
    above = np.clip((y - top) / (waist_y - top), 0, 1)
    below = np.clip((y - waist_y) / (flared - waist_y), 0, 1)
    waist = _each(garments.waist)
    bottom = np.where(crotch < hem, waist, _each(garments.bottom))
    width = _each(garments.shoulder) + (waist - _each(garments.shoulder)) * above * above
    width = width + (bottom - waist) * below
    edge = top + 0.12 * side * (top < -0.5)
    body = np.maximum(np.maximum(side - width, edge - y), y - flared)

    along = np.clip((y - crotch) / np.maximum(hem - crotch, 0.1), 0, 1)
    center = waist / 2 + _each(photos.stride) * along
    leg = np.abs(side - center) - (waist / 2 + (_each(garments.bottom) - waist / 2) * along)
    body = np.minimum(body, np.maximum(np.maximum(leg, crotch - y), y - hem))

    reach, off = _limb(x, y, garments.shoulder - 0.07, garments.top + 0.12, photos.arms)
    length = _each(garments.sleeve)
    off = np.maximum(np.maximum(off - (0.12 - 0.04 * reach), reach - length), -0.1 - reach)
    body = np.where(length > 0, np.minimum(body, off), body)
    hole = _neckline(side, y - top, garments)
    cuff = np.where((length > 0) & (reach > 0) & (off < 0.02), length - reach, 9)
    return np.maximum(body, hole), np.minimum(hem - y, cuff)


def _neckline(side: Maps, depth: Maps, garments: Garments) -> Maps:
    """About the distance from the edge of the neckline, positive inside the opening."""
    deep = np.maximum(_each(garments.neck), 0.01)
    wide = 0.11 + 0.3 * deep
    pointed = 1 - np.maximum(depth, 0) / deep - side / wide
    rounded = 1 - np.hypot(side / wide, np.maximum(depth, 0) / deep)
    hole = np.where(_each(garments.pointed), pointed, rounded) * deep * 0.7
    return np.where(_each(garments.neck) > 0, hole, -9)


def _limb(
    x: Maps, y: Maps, start_x: Rows, start_y: Rows, angles: Float[np.ndarray, "n 2"]
) -> tuple[Maps, Maps]:
    """The distance of each pixel along the arm of its side, and from the axis of the arm."""
    angle = np.where(x < 0, _each(angles[:, 0]), _each(angles[:, 1]))
    sine, cosine = np.sin(angle), np.cos(angle)
    right, under = np.abs(x) - _each(start_x), y - _each(start_y)
    return right * sine + under * cosine, np.abs(right * cosine - under * sine)


def _figure(x: Maps, y: Maps, garments: Garments, photos: Photos) -> tuple[Maps, Maps]:
    """Distances from the figure's skin and from its other clothes."""
    side = np.abs(x)
    head = (np.hypot(x / 0.13, (y - SHOULDER + 0.24) / 0.17) - 1) * 0.13
    neck = np.maximum(side - 0.07, np.abs(y - SHOULDER + 0.06) - 0.12)
    start_x, start_y = np.full((2, len(x)), [[0.27], [SHOULDER + 0.1]], np.float32)
    reach, off = _limb(x, y, start_x, start_y, photos.arms)
    arms = np.maximum(off - 0.065, np.maximum(reach - 0.95, -0.05 - reach))
    along = np.clip((y - 0.2) / 1.6, 0, 1)
    leg = np.abs(side - 0.14 - _each(photos.stride) * along) - 0.13 + 0.07 * along
    legs = np.maximum(leg, np.maximum(0.1 - y, y - 1.9))
    torso = np.maximum(
        side - 0.29 + 0.07 * np.cos(5 * y), np.maximum(SHOULDER + 0.03 - y, y - 0.25)
    )
    skin = np.minimum(np.minimum(np.minimum(head, neck), np.minimum(arms, legs)), torso)
    upper = _each(garments.neck) > 0
    return skin, np.where(upper, np.minimum(legs, np.maximum(torso, -y)), torso)


def _fabric(x: Maps, y: Maps, garments: Garments, *, band: Maps, pixel: Maps) -> Images:
    """Colours of the cloth before light: pattern, trim, print, buttons."""
    cosine, sine = _each(np.cos(garments.angle)), _each(np.sin(garments.angle))
    frequency, phase = _each(garments.frequency), _each(garments.phase)
    u = frequency * (x * cosine + y * sine) + phase
    v = frequency * (y * cosine - x * sine) + phase
    soft = 1.5 / np.minimum(frequency * pixel, 1.5)  # a sine's step, one pixel wide
    stripes = _step(np.sin(u), soft)
    fraction = np.clip((y - _each(garments.top)) / _each(garments.hem - garments.top), 0, 1)
    patterns = [
        np.zeros_like(stripes),
        stripes,
        (stripes + _step(np.sin(v), soft)) / 2,
        _step(np.sin(u) * np.sin(v) - 0.35, soft),
        fraction,
        _step(fraction - 0.35 - 0.05 * phase, 40.0),
    ]
    mix = np.choose(_each(garments.pattern), patterns)
    mix = np.where(_each(garments.trim), np.maximum(mix, _cover(band - 0.07, pixel)), mix)
    fabric = _paint(_rgb(garments.color), _rgb(garments.second_color), mix)
    print_map = _cover(_motif(x, y, garments), pixel)
    fabric = _paint(fabric, _rgb(garments.print_color), print_map)
    line = _cover(np.abs(x) - 0.015, pixel) * 0.6 * _each(garments.placket)
    return fabric * (1 - line[:, None])


def _motif(x: Maps, y: Maps, garments: Garments) -> Maps:
    """Distance from the print's edge."""
    size = _each(garments.motif_size)
    x = (x - _each(garments.motif_x)) / size
    y = (y - _each(garments.top + garments.motif_y)) / size
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
    return np.choose(_each(garments.motif), distances) * size


def _background(across: Maps, down: Maps, photos: Photos, *, pixel: np.float32) -> Images:
    top, bottom = _rgb(photos.ground[:, 0]), _rgb(photos.ground[:, 1])
    image = _paint(top, bottom, (down + 1) / 2 + 0 * across)
    image = image * (1 + _waves(across, down, photos.texture))[:, None]
    for index in range(CLUTTER):
        distance = _shape(across, down, photos.clutter[:, index])
        image = _paint(image, _rgb(photos.clutter_color[:, index]), _cover(distance, pixel))
    return image


def _shape(across: Maps, down: Maps, shape: Float[np.ndarray, "n 5"]) -> Maps:
    """Distance from the edge of a rectangle or an ellipse."""
    x, y, width, height, roundness = (_each(column) for column in shape.T)
    right, under = np.abs(across - x) / width, np.abs(down - y) / height
    measure = np.where(roundness > 0.5, np.hypot(right, under), np.maximum(right, under))
    return (measure - 1) * np.minimum(width, height)


def _waves(x: Maps, y: Maps, waves: Float[np.ndarray, "n 4"]) -> Maps:
    amplitude, along_x, along_y, phase = (_each(column) for column in waves.T)
    return amplitude * np.sin(along_x * x + along_y * y + phase)


def _paint(under: np.ndarray, over: np.ndarray, cover: Maps) -> Images:
    return under + (over - under) * cover[:, None]


def _cover(distance: Maps, pixel: Maps | np.float32) -> Maps:
    """Share of a pixel that lies inside an edge."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _step(value: Maps, slope: Maps | float) -> Maps:
    return np.clip(0.5 + value * slope, 0, 1)


def _each(rows: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, "n 1 1"]:
    """One value per image, shaped to broadcast over maps of pixels."""
    return rows[:, None, None]


def _rgb(colors: Colors) -> Images:
    """One colour per image, shaped to broadcast over images."""
    return colors[:, :, None, None]
