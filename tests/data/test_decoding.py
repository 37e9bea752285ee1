"""Files as phones and shops make them become the pixels that Pillow makes of them."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmljax.config import DataConfig
from mmljax.data import decoding
from mmljax.errors import UserError
from mmljax.types import Split

tf = pytest.importorskip("tensorflow", reason="image files are read by TensorFlow")

from mmljax.data import headers, pipeline, transforms  # noqa: E402

HEIGHT, WIDTH = 41, 64


def _picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours without any symmetry."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(5 * x + 3 * y), np.cos(4 * y + x * x), np.sin(9 * x * y + x)]
    return Image.fromarray(np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


def _with_alpha() -> Image.Image:
    picture = _picture().convert("RGBA")
    picture.putalpha(_picture().convert("L").transpose(Image.Transpose.ROTATE_180))
    return picture


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _exif(orientation: int, *, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block with another field, and with the orientation as a SHORT (3) or a LONG (4)."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(f"{order}I" if kind == 4 else f"{order}Hxx", orientation)
    fields = struct.pack(f"{order}HHIHxx", 0x0100, 3, 1, 7)
    fields += struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, 2) + fields + b"\0" * 4


def _png16(channels: int, kind: int) -> bytes:
    """A PNG of 16 bits a channel, whose lower bytes are not 0."""
    pixels = np.asarray(_picture()).astype(np.int64) * 256 + np.arange(WIDTH)[:, None]
    rows = np.repeat(pixels, 2, axis=2)[..., :channels].astype(">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def _two(kind: str, picture: Image.Image) -> bytes:
    second = picture.transpose(Image.Transpose.ROTATE_180)
    return _saved(picture, kind, save_all=True, append_images=[second], duration=100)


CASES = {
    "jpeg": lambda: _saved(_picture(), "JPEG"),
    "grey jpeg": lambda: _saved(_picture().convert("L"), "JPEG"),
    "cmyk jpeg": lambda: _saved(_picture().convert("CMYK"), "JPEG"),
    "progressive jpeg": lambda: _saved(_picture(), "JPEG", progressive=True),
    "png": lambda: _saved(_picture(), "PNG"),
    "png with alpha": lambda: _saved(_with_alpha(), "PNG"),
    "grey png with alpha": lambda: _saved(_with_alpha().convert("LA"), "PNG"),
    "png with palette": lambda: _saved(_picture().quantize(16), "PNG", transparency=3),
    "png of two levels": lambda: _saved(_picture().convert("1"), "PNG"),
    "png of 16 bits": lambda: _png16(3, 2),
    "png of 16 bits with alpha": lambda: _png16(4, 6),
    "webp": lambda: _saved(_picture(), "WEBP"),
    "lossless webp": lambda: _saved(_picture(), "WEBP", lossless=True),
    "webp with alpha": lambda: _saved(_with_alpha(), "WEBP", exact=True),
    "lossless webp with alpha": lambda: _saved(_with_alpha(), "WEBP", lossless=True, exact=True),
    "webp with a profile": lambda: _saved(_picture(), "WEBP", icc_profile=b"profile"),
    "animated webp": lambda: _two("WEBP", _picture()),
    "avif": lambda: _saved(_picture(), "AVIF"),
    "avif with alpha": lambda: _saved(_with_alpha(), "AVIF"),
    "gif": lambda: _saved(_picture(), "GIF"),
    "animated gif": lambda: _two("GIF", _picture()),
    "transparent gif": lambda: _saved(_picture().quantize(16), "GIF", transparency=3),
    "bmp": lambda: _saved(_picture(), "BMP"),
    "bmp with palette": lambda: _saved(_picture().quantize(16), "BMP"),
    "bmp with alpha": lambda: _saved(_with_alpha(), "BMP"),
}
"""Files by name, each to be compared with what Pillow makes of it."""

TURNED = {
    f"{kind} {orientation}": (kind, orientation)
    for kind in ("jpeg", "webp", "avif", "png")
    for orientation in range(1, 9)
}


def _turned(kind: str, orientation: int) -> bytes:
    return _saved(_picture(), kind.upper(), exif=_exif(orientation))


def _upright(contents: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(contents))).convert("RGB")


def _split(contents: list[bytes]) -> Split:
    images = np.empty(len(contents), object)
    images[:] = contents
    names = np.array([f"image {i}" for i in range(len(contents))])
    return Split(images, np.zeros(len(contents), np.int32), names)


def _decoded(contents: list[bytes], side: int = HEIGHT) -> np.ndarray:
    """The central squares of images whose shorter side is ``side``, by the pipeline."""
    config = DataConfig(
        image_size=side,
        resize_size=side,
        resampling="bilinear",
        eval_batch_size=len(contents),
        threads=2,
    )
    rows = slice(0, len(contents))
    split = _split(contents)
    batches = pipeline.eval_batches(split, config=config, rows=rows, place=lambda batch: batch)
    return next(iter(batches)).images


def _square(picture: Image.Image, side: int = HEIGHT) -> np.ndarray:
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    plain = {name: make() for name, make in CASES.items()}
    return plain | {name: _turned(*case) for name, case in TURNED.items()}


@pytest.fixture(scope="module")
def decoded(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return dict(zip(files, _decoded(list(files.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_the_pixels_that_pillow_gives_it(name, files, decoded):
    expected = _square(Image.open(io.BytesIO(files[name])).convert("RGB"))
    np.testing.assert_array_equal(decoded[name], expected)


@pytest.mark.parametrize("name", TURNED)
def test_exif_orientation_is_applied(name, files, decoded):
    np.testing.assert_array_equal(decoded[name], _square(_upright(files[name])))
    kind, orientation = TURNED[name]
    if orientation > 1:
        assert np.abs(decoded[name].astype(int) - decoded[f"{kind} 1"]).mean() > 10


def test_grey_of_16_bits_keeps_its_upper_8(files):
    grey = (np.asarray(_picture().convert("L")).astype(np.uint16) * 256 + 77).astype(np.uint16)
    plain, turned = (
        _saved(Image.fromarray(grey), "PNG"),
        _saved(Image.fromarray(grey), "PNG", exif=_exif(3)),
    )
    upper = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    found = _decoded([plain, turned])
    np.testing.assert_array_equal(found[0], _square(Image.fromarray(upper)))
    np.testing.assert_array_equal(found[1], _square(Image.fromarray(upper[::-1, ::-1])))


def test_which_files_are_left_to_pillow(files):
    needs = tf.function(headers.needs_pillow)
    found = {name for name, contents in files.items() if needs(tf.constant(contents)).numpy()}
    expected = {
        *("webp with alpha", "lossless webp with alpha", "animated webp", "avif"),
        *("avif with alpha", "gif", "animated gif", "transparent gif", "bmp with palette"),
        *(name for name, (kind, _) in TURNED.items() if kind != "jpeg"),
    }
    assert found == expected


def test_the_stated_shape_is_that_of_the_stored_image(files):
    shape = tf.function(headers.stated_shape)
    for name, contents in files.items():
        if decoding.is_avif(contents):
            found = decoding.avif_shape(contents)
        else:
            found = tuple(shape(tf.constant(contents)).numpy().tolist())
        assert found == (HEIGHT, WIDTH), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(50, 83), (700, 333)])
def test_random_crops_are_windows_of_the_upright_image(orientation, shape):
    encoded = _saved(_picture(*shape), "JPEG", exif=_exif(orientation), subsampling=0)
    upright = _saved(_upright(encoded), "PNG")
    crop = _random_crop()
    for numbers in np.random.default_rng(3).random((6, transforms.NUMBERS)):
        found, expected = (
            crop(tf.constant(contents), tf.constant(numbers)).numpy().astype(int)
            for contents in (encoded, upright)
        )
        difference = np.abs(found - expected)
        scaled = min(shape) > 100  # such a JPEG is decoded at a reduced scale
        assert difference.max() <= (6 if scaled else 1)
        assert difference.mean() <= 0.5


@functools.cache
def _random_crop():
    return tf.function(
        functools.partial(
            transforms.random_crop, image_size=24, scale=(0.3, 1.0), ratio=(0.75, 1.4), flip=True
        )
    )


def _orientation(contents: bytes) -> int:
    return int(_orientation_of()(tf.constant(contents)))


@functools.cache
def _orientation_of():
    return tf.function(headers.jpeg_orientation)


def test_where_exif_is_looked_for():
    plain, block = _saved(_picture(), "JPEG"), _exif(6)

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    def inserted(*segments: bytes) -> bytes:
        return plain[:2] + b"".join(segments) + plain[2:]

    exif, xmp = segment(0xE1, block), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    assert _orientation(plain) == 1
    assert _orientation(inserted(exif)) == 6
    assert _orientation(inserted(xmp, segment(0xE2, b"p" * 65000), exif)) == 6
    assert _orientation(inserted(segment(0xFE, b"a comment"), segment(0xEE, b"Adobe"), exif)) == 6
    assert _orientation(inserted(segment(0xE1, _exif(8, order=">")))) == 8
    assert _orientation(inserted(segment(0xE1, _exif(7, order=">", kind=4)))) == 7
    assert _orientation(inserted(segment(0xE1, _exif(5, kind=4)))) == 5
    assert _orientation(_saved(_picture(), "PNG")) == 1


def test_damaged_exif_counts_as_none():
    plain = _saved(_picture(), "JPEG")
    whole = _exif(6)
    random = np.random.default_rng(0)
    blocks = [whole[:size] for size in range(6, len(whole) - 8)]
    blocks += [_exif(0), _exif(9), b"Exif\0\0" + b"II*\0\xff\xff\xff\xff\x01\0"]
    blocks += [b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + random.bytes(40) for _ in range(5)]
    for block in blocks:
        head = struct.pack(">BBH", 0xFF, 0xE1, len(block) + 2)
        assert _orientation(plain[:2] + head + block + plain[2:]) in range(1, 9)
    assert _orientation(_saved(_picture(), "JPEG", exif=_exif(9))) == 1
    assert _orientation(_saved(_picture(), "JPEG", exif=_exif(0))) == 1


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"\xff\x0a", "JPEG XL"),
    ],
)
def test_what_is_not_read_is_refused_by_name(start, kind):
    with pytest.raises(UserError, match=f"image 0 cannot be decoded: it is {kind}, which is not"):
        _decoded([start + b"\0" * 40])


def test_broken_files_for_pillow_are_named(files):
    broken = [
        files["avif"][:300],
        files["gif"][:40],
        files["animated webp"][:100],
        b"\0\0\0\x20ftypavif" + b"\0" * 30,
    ]
    for contents in broken:
        text = f"its {len(contents)} bytes are not a whole JPEG, PNG, WebP, AVIF, GIF or BMP"
        with pytest.raises(UserError, match=text):
            pipeline._decode_one(_split([contents]), 0, _NUMBERS, crop=_CROP)


_NUMBERS = np.zeros(transforms.NUMBERS)


_CROP = pipeline._crop(DataConfig(image_size=8, resize_size=8, resampling="bilinear"), random=False)


def test_an_avif_that_states_too_many_pixels_is_not_decoded(files):
    contents = files["avif"].replace(
        struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", 60_000, 50_000)
    )
    with pytest.raises(UserError, match="states 60000 x 50000 pixels, and more than 178,956,970"):
        pipeline._decode_one(_split([contents]), 0, _NUMBERS, crop=_CROP)
