"""Hundreds of malformed inputs, each drawn by a seeded generator and certainly invalid.

A family is a function of a random generator and a folder of its own that makes one input and
returns the call that reads it. The call must raise ``UserError``, or return how many it skipped and
counted, which must be above 0.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Attempt = Callable[[], int]
Random = np.random.Generator


def pick(random: Random, choices: Sequence[Any]) -> Any:
    """One of some choices; they need not be of one type."""
    return choices[int(random.integers(len(choices)))]


def garbage(random: Random, size: int | None = None) -> bytes:
    """Random bytes; the first makes them invalid UTF-8."""
    size = int(random.integers(1, 400)) if size is None else size
    return b"\xff" + random.bytes(size)


def cut(random: Random, contents: bytes, *, most: float = 0.9) -> bytes:
    """The beginning of a file, at least a byte short of ``most`` of it."""
    return contents[: int(random.integers(0, max(1, int(len(contents) * most))))]


def put(folder: Path, name: str, contents: bytes) -> Path:
    """A file of that name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


# Lists of images.

ITEMS = {"train": ("id_1", "id_2"), "query": ("id_3", "id_4"), "gallery": ("id_3", "id_4")}
ESCAPES = ("../a.jpg", "/etc/passwd", "img/../../a.jpg", "..", "img/a/../../../../etc/passwd")
NAMES = (  # of no file, each hard on somebody's parser
    "img/absent.jpg",
    "img/a\0b.jpg",
    "im\0g/a.jpg",
    "img/" + "a" * 5000 + ".jpg",
    "b" * 5000 + "/a.jpg",
    "img/loop/a.jpg",
    "gs://bucket/a.jpg",
    "img/\udcff.jpg",
    "C:\\windows\\a.jpg",
    "img/*.jpg",
    "~/a.jpg",
)


def _rows() -> list[list[str]]:
    return [
        [f"img/{split}_{item}_{view}.jpg", item, split]
        for split, items in ITEMS.items()
        for item in items
        for view in range(2)
    ]


def _images(folder: Path, rows: list[list[str]]) -> None:
    for name, *_ in rows:
        put(folder, name, b"never opened")
    (folder / "img" / "loop").symlink_to("loop")


def _spoil(random: Random, rows: list[list[str]]) -> list[list[str]]:
    """Rows with one error, in a row or between rows."""
    row = rows[int(random.integers(len(rows)))]
    kind = int(random.integers(8))
    if kind == 0:
        row.pop()
    elif kind == 1:
        row[1] = ""
    elif kind == 2:
        row[2] = pick(random, ["Train", "test_", "validation", "0", "trai\0n", "\u202etrain", "-"])
    elif kind == 3:
        rows.append(list(row))
    elif kind == 4:
        rows[-1][1] = "id_1"  # an item both in train and in gallery
    elif kind == 5:
        row[0] = pick(random, ESCAPES)
    elif kind == 6:
        row[0] = pick(random, NAMES)
    else:
        rows[:] = [row for row in rows if row[2] != "train"]
    return rows


def in_shop_list(random: Random, folder: Path) -> Attempt:
    """In-Shop's list of images."""
    from mmljax.data.readers.in_shop import read_in_shop

    rows = _rows()
    _images(folder, rows)
    count = str(len(rows))
    header = "image_name item_id evaluation_status"
    if (kind := int(random.integers(13))) < 7:
        rows = _spoil(random, rows)
        count = str(len(rows))
    elif kind == 7:
        count = pick(random, ["", "-1", "1e9", "12.0", str(2**70), "many", "\0"])
    elif kind == 8:
        header = pick(random, ["", "image_name", header.upper(), header + " more", "\0"])
    elif kind == 9:
        rows[-1].append(pick(random, ["more", "\x0b more", "\u2028more"]))
    text = "\n".join([count, header, *(" ".join(row) for row in rows), ""])
    contents = text.encode("utf-8", "surrogateescape")
    if kind == 10:
        contents = cut(random, contents.rstrip())
    elif kind == 11:
        contents = garbage(random)
    elif kind == 12:
        contents = text.encode("utf-16")
    put(folder, "Eval/list_eval_partition.txt", contents)
    return lambda: len(read_in_shop(folder).train.labels) * 0


def bounding_boxes(random: Random, folder: Path) -> Attempt:
    """In-Shop's list of boxes."""
    from mmljax.data.readers.in_shop_list import read_in_shop_boxes

    header = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
    rows = [[f"img/{i}.jpg", "1", "2", "3", "4", "50", "60"] for i in range(5)]
    row = rows[int(random.integers(5))]
    kind = int(random.integers(5))
    if kind == 0:
        row[int(random.integers(1, 7))] = pick(random, ["-1", "1.5", "", "x", "\u00b2", "1e3"])
    elif kind == 1:
        row[int(random.integers(5, 7))] = "0"
    elif kind == 2:
        rows.append(list(row))
    elif kind == 3:
        row.pop()
    text = "\n".join([str(len(rows)), header, *(" ".join(row) for row in rows), ""])
    contents = text.encode() if kind < 4 else cut(random, text.encode().rstrip())
    put(folder, "Anno/list_bbox_inshop.txt", contents)
    return lambda: len(read_in_shop_boxes(folder)) * 0


def csv_list(random: Random, folder: Path) -> Attempt:
    """A CSV of paths, labels and splits."""
    from mmljax.data.readers.csv import read_csv

    rows = _rows()
    _images(folder, rows)
    header = "path,label,split"
    kind = int(random.integers(11))
    if kind < 6:
        rows = _spoil(random, rows)
    text = "\n".join([header, *(",".join(row) for row in rows), ""])
    contents = text.encode("utf-8", "surrogateescape")
    if kind == 6:
        contents = contents.replace(b"label", pick(random, [b"item", b"", b"Label", b"lab\0el"]), 1)
    elif kind == 7:
        contents += b'img/x.jpg,"never closed,query\n'
    elif kind == 8:
        contents += b"img/x.jpg," + b"a" * 200_000 + b",query\n"
    elif kind == 9:
        contents = garbage(random)
    elif kind == 10:
        empty = (b"", b"\n\n\n", b"\0" * 50, header.encode())
        contents = pick(random, [*empty, text.encode("utf-16")])
    path = put(folder, "images.csv", contents)
    return lambda: len(read_csv(path).train.labels) * 0


def class_folders(random: Random, folder: Path) -> Attempt:
    """A folder of class folders."""
    from mmljax.data.readers.folder import read_folder

    for split, classes in (("train", "ab"), ("test", "cd")):
        for name in classes:
            put(folder, f"{split}/{name}/1.jpg", b"never opened")
    kind, share = int(random.integers(6)), 0.5
    if kind == 0:
        shutil.rmtree(folder / pick(random, ["train", "test"]) / "a", ignore_errors=True)
        (folder / pick(random, ["train/e", "test/e"])).mkdir()
    elif kind == 1:
        put(folder, "test/a/1.jpg", b"of a class in train")
    elif kind == 2:
        (folder / "test").rename(folder / "Test")
    elif kind == 3:
        (folder / "query").mkdir()
    elif kind == 4:
        put(folder, "test/e/notes.txt", b"no image")
    else:
        (folder / "train").rename(folder / "other")
        share = pick(random, [0.0, 1.0, -1.0, 99.0, 1e300])
    return lambda: len(read_folder(folder, test_share=share).train.labels) * 0


# Files of images.


def photograph(random: Random, kind: str) -> bytes:
    """A valid image of noise."""
    pixels = random.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _png_stating(contents: bytes, width: int, height: int) -> bytes:
    header = contents[12:16] + struct.pack(">II", width, height) + contents[24:29]
    return contents[:12] + header + struct.pack(">I", zlib.crc32(header)) + contents[33:]


def _jpeg_stating(contents: bytes, width: int, height: int) -> bytes:
    place = contents.index(b"\xff\xc0") + 5
    return contents[:place] + struct.pack(">HH", height, width) + contents[place + 4 :]


HUGE = (1, 65_535, 65_500, 20_000, 50_000)


def broken_image(random: Random) -> bytes:
    """The bytes of a file that no decoder may take for an image."""
    png, jpeg = photograph(random, "PNG"), photograph(random, "JPEG")
    huge = 65_500, pick(random, HUGE[1:])
    kind = int(random.integers(14))
    if kind == 0:
        return b""
    if kind == 1:
        return garbage(random)
    if kind == 2:
        magic = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF", b"II*\0")
        return pick(random, magic) + random.bytes(int(random.integers(0, 200)))
    if kind == 3:
        return cut(random, jpeg, most=0.3)
    if kind == 4:
        return cut(random, png, most=0.9)
    if kind == 5:
        return _png_stating(png, *huge)
    if kind == 6:
        return _jpeg_stating(jpeg, *huge)
    if kind == 7:
        return _png_stating(png, *pick(random, [(0, 40), (30, 0), (2**31 - 1, 2**31 - 1)]))
    if kind == 8:
        return _jpeg_stating(jpeg, *pick(random, [(0, 40), (30, 0), (0, 0)]))
    if kind == 9:
        place = int(random.integers(16, 29))
        return png[:place] + bytes([png[place] ^ 0x55]) + png[place + 1 :]  # its checksum fails
    if kind == 10:
        return photograph(random, "GIF")[:6] + struct.pack("<HH", *huge) + garbage(random)
    if kind == 11:
        size = pick(random, [(2**30, 2**30), (0, 0), (-(2**31), 5), (70_000, 70_000)])
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, *size, 1, 24, *[0] * 6)
    if kind == 12:
        return pick(random, [b"<html>404</html>", b"version https://git-lfs", b"\0" * 1000, b"BM"])
    start = png.index(b"IDAT") - 4
    return png[:start] + png[-12:]  # a header, an end, and nothing between


def _small_data() -> Any:
    from mmljax.config import DataConfig

    return DataConfig(
        check_counts=False,
        corrupt="skip",
        image_size=8,
        resize_size=8,
        resampling="bilinear",
        batch_size=4,
        images_per_class=2,
        eval_batch_size=2,
        threads=1,
        prefetch=1,
    )


def image_evaluated(random: Random, folder: Path) -> Attempt:
    """A query image, which is never skipped."""
    from mmljax.data.pipeline import eval_batches

    split = _split([photograph(random, "PNG"), broken_image(random)], folder, random)
    options = {"config": _small_data(), "rows": slice(None), "place": lambda batch: batch}
    return lambda: len(list(eval_batches(split, **options))) * 0


def image_skipped(random: Random, folder: Path) -> Attempt:
    """A training image with ``corrupt=skip``: a warning for each."""
    import logging

    from mmljax.data.pipeline import train_batches

    good = [photograph(random, "JPEG") for _ in range(3)]
    split = _split([good[0], broken_image(random), *good[1:]], folder, random)
    split = split._replace(labels=np.array([0, 0, 1, 1], np.int32))

    def attempt() -> int:
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        log = logging.getLogger("mmljax.data.pipeline")
        log.addHandler(handler)
        try:
            list(
                train_batches(
                    split,
                    config=_small_data(),
                    seed=0,
                    steps=range(2),
                    rows=slice(None),
                    place=lambda batch: batch,
                )
            )
        finally:
            log.removeHandler(handler)
        return len(records)

    return attempt


def image_left_out(random: Random, folder: Path) -> Attempt:
    """An image of a folder that is embedded with ``--skip-corrupt``."""
    from mmljax.data.pipeline import decodable

    split = _split([photograph(random, "JPEG"), broken_image(random)], folder, random)
    return lambda: int((~decodable(split, _small_data())).sum())


def image_shown(random: Random, folder: Path) -> Attempt:
    """An image that needs a thumbnail for a page or a table."""
    from mmljax.data.thumbnails import thumbnail

    split = _split([broken_image(random)], folder, random)
    return lambda: thumbnail(split, 0, side=16).width * 0


def _split(images: list[bytes], folder: Path, random: Random) -> Any:
    """The images as files or as bytes."""
    from mmljax.types import Split

    names = np.array([f"{i}.jpg" for i in range(len(images))])
    stored: Any = np.empty(len(images), object)
    stored[:] = images
    if random.integers(2):
        stored = np.array([str(put(folder, *each)) for each in zip(names, images, strict=True)])
    return Split(stored, np.full(len(images), -1, np.int32), names)


# Files of arrays.


def array_file(random: Random, folder: Path) -> Attempt:
    """An ``.npz`` of images, labels and splits."""
    from mmljax.data.readers.arrays import read_arrays

    arrays: dict[str, Any] = {
        "images": random.integers(0, 256, (8, 6, 6)).astype(np.uint8),
        "labels": np.repeat(np.arange(4, dtype=np.int32), 2),
        "split": np.repeat(["train", "query"], 4),
    }
    kind = int(random.integers(9))
    name = pick(random, list(arrays))
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = arrays[name][: int(random.integers(0, 7))]
    elif kind == 2:
        x = arrays["images"]
        deep, empty = x[..., None, None], np.zeros((8, 0, 6), np.uint8)
        arrays["images"] = pick(random, [x.astype(np.float32), x[0], deep, empty])
    elif kind == 3:
        labels = arrays["labels"]
        arrays["labels"] = pick(random, [labels * 1.0, labels[:, None], labels.astype(str)])
    elif kind == 4:
        values = (np.full(8, 3), np.full(8, "train"), np.full(8, np.nan), np.array(["test"] * 8))
        arrays["split"] = pick(random, values)
    elif kind == 5:
        arrays[name] = np.array([Trap()] * 8, object)
    file = io.BytesIO()
    np.savez(file, **arrays)
    contents = file.getvalue()
    if kind == 6:
        contents = cut(random, contents)
    elif kind == 7:
        contents = pick(random, [garbage(random), b"", b"PK\x03\x04" + garbage(random)])
    elif kind == 8:
        place = contents.index(b"\x93NUMPY") + 100
        contents = contents[:place] + garbage(random, 30) + contents[place + 31 :]
    path = put(folder, "images.npz", contents)
    return lambda: len(read_arrays(path).train.labels) * 0


# Files of weights.


class Trap:
    """What a pickle must never be allowed to call: it leaves a file behind."""

    sprung = Path("sprung")

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sprung,)


def _torch_file(pickled: bytes, storages: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, contents in storages.items():
            archive.writestr(f"archive/data/{key}", contents)
    return file.getvalue()


def _safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weight_file(random: Random, folder: Path) -> Attempt:
    """An untrusted file of weights."""
    from mmljax.models.weight_files import read_weights

    tensor = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    whole = _safetensors({"a": tensor}, b"\0" * 24)
    kind = int(random.integers(9))
    suffix = pick(random, [".pth", ".pt", ".bin"])
    if kind == 0:
        contents = pickle.dumps(pick(random, [Trap(), {"a": Trap()}, [Trap()]]))
    elif kind == 1:
        contents = _torch_file(pickle.dumps({"a": Trap()}, protocol=2), {"0": b"\0" * 24})
    elif kind == 2:
        contents = garbage(random)
    elif kind == 3:
        value = pick(random, [[1, 2], "text", {"a": 1}, {1: 2}, None, {"model": 3}])
        contents = _torch_file(pickle.dumps(value, protocol=2), {})
    elif kind == 4:
        contents = cut(random, _torch_file(pickle.dumps({}, protocol=2), {"0": b"\0" * 24}))
    elif kind == 5:
        contents, suffix = cut(random, whole), ".safetensors"
    elif kind == 6:
        change = pick(
            random,
            [
                {"dtype": "F99"},
                {"shape": [2, 4]},
                {"shape": [-2, -3]},
                {"data_offsets": [0, 2**60]},
                {"data_offsets": [24, 0]},
                {"shape": [2**40, 2**40]},
            ],
        )
        contents, suffix = _safetensors({"a": tensor | change}, b"\0" * 24), ".safetensors"
    elif kind == 7:
        header = pick(random, [b"", b"{", b"[]", b"\xff\xfe", b"null"])
        contents, suffix = _safetensors(header, b""), ".safetensors"
    else:
        contents, suffix = struct.pack("<Q", 2**62) + random.bytes(100), ".safetensors"
    path = put(folder, f"weights{suffix}", contents)
    return lambda: len(read_weights(path)) * 0


# Configs, and what a run leaves.

_NESTED = ("data", "model", "optimizer", "evaluation", "checkpoint", "log", "memory")


def config_values(random: Random, folder: Path, *, plain: dict[str, Any]) -> Attempt:
    """A config with one invalid value."""
    from mmljax.config import from_mapping

    config = json.loads(json.dumps(plain))
    section = config[pick(random, _NESTED)]
    name = pick(random, [key for key in section if not isinstance(section[key], dict)])
    kind = int(random.integers(7))
    if kind == 0:
        section[name + pick(random, ["s", "_", " ", "\0"])] = section[name]
    elif kind < 3:
        section[name] = pick(random, [None, {}, {"a": 1}, object(), [[1]], b"1"])
    elif kind == 3:
        key = pick(random, _NESTED)
        config[key] = pick(random, [None, 3, "text", [], {"a": {}}])
    elif kind == 4:
        numbers = (np.nan, np.inf, -np.inf, -1.0, -(2.0**80))
        key = pick(random, ["clip_norm", "epsilon", "b1", "b2", "step_factor"])
        config["optimizer"][key] = float(pick(random, numbers))
    elif kind == 5:
        key = pick(random, ["batch_size", "eval_batch_size", "images_per_class"])
        config["data"][key] = pick(random, [0, -1, 1.5, "8", True, -(2**70)])
    else:
        config["seed"] = pick(random, [-1, 2**32, 2**90, 0.5, None, "0"])
    return lambda: len(from_mapping(config).objectives) * 0


def run_config(random: Random, folder: Path, *, plain: dict[str, Any]) -> Attempt:
    """The ``config.json`` of a run."""
    from mmljax.inference.embedder import load_embedder
    from mmljax.runs.reader import load_run_data, read_run

    kind = int(random.integers(5))
    contents = json.dumps(plain).encode()
    if kind == 0:
        contents = cut(random, contents)
    elif kind == 1:
        contents = garbage(random)
    elif kind == 2:
        contents = pick(random, [b"", b"[]", b"null", b"3", b'"text"', b"\0" * 9, b"[" * 100_000])
    elif kind == 3:
        changed = json.loads(contents)
        changed[pick(random, list(changed))] = pick(random, [None, [], "text", 3.5])
        changed["seed"] = pick(random, [None, [], "text"])
        contents = json.dumps(changed).encode()
    path = put(folder, "config.json", contents)
    if kind == 4:
        path.unlink()
        path.mkdir()
    put(folder, "metrics.jsonl", b'{"step": 1, "kind": "train", "loss": 1.0}\n')
    read = pick(random, [load_embedder, load_run_data, read_run])
    return lambda: len(read(folder)) * 0


def run_metrics(random: Random, folder: Path, *, plain: dict[str, Any]) -> Attempt:
    """The ``metrics.jsonl`` of a run, damaged before its last line."""
    from mmljax.runs.reader import read_run

    put(folder, "config.json", json.dumps(plain).encode())
    rows = [json.dumps({"step": i, "kind": "train", "loss": 1.0}).encode() for i in range(5)]
    bad = (
        *(b"", b"{", b"null", b"[]", b'{"step": "1", "kind": "train"}', b'{"kind": "train"}'),
        *(b'{"step": 1}', b'{"step": 1, "kind": 3}', b"\0\0\0", b"NaN", rows[0] + rows[1]),
        *(rows[0][:-3], b'{"step": 1, "kind": "train", "loss": "high"}', b"[" * 100_000),
        *(b'{"step": 1, "kind": "train", "loss": [1]}', b'{"step": true, "kind": "train"}'),
    )
    rows[int(random.integers(4))] = pick(random, [*bad, garbage(random).replace(b"\n", b"")])
    path = put(folder, "metrics.jsonl", b"\n".join([*rows, b""]))
    if random.integers(10) == 0:
        path.unlink()
        if random.integers(2):
            path.mkdir()
    return lambda: len(read_run(folder)) * 0


def run_records(random: Random, folder: Path) -> Attempt:
    """The ``queries.npz`` of one of two runs that are compared."""
    from mmljax.retrieval.compare import compare
    from mmljax.retrieval.records import read_records

    def arrays() -> dict[str, Any]:
        return {
            "protocol": json.dumps({"crop": 8}),
            "step": 3,
            "name": np.array(["a", "b", "c", "d"]),
            "label": np.array([0, 0, 1, 1]),
            "value recall@1": np.array([0.0, 1.0, 1.0, np.nan]),
            "neighbor rows": np.array([[0, 1]] * 4),
            "neighbor similarity": np.array([[0.9, 0.8]] * 4),
            "neighbor names": np.array(["x", "y"]),
            "neighbor labels": np.array([0, 1]),
        }

    broken = arrays()
    kind = int(random.integers(7))
    name = pick(random, ["protocol", "step", "name", "label"])
    if kind == 0:
        del broken[name]
    elif kind == 1:
        key = pick(random, ["name", "label", "value recall@1", "neighbor rows", "neighbor labels"])
        broken[key] = broken[key][: int(random.integers(0, 2))]
    elif kind == 2:
        broken[name] = np.array([Trap()] * 4, object)
    elif kind == 3:
        broken["protocol"] = pick(random, ["", "{", "[]", "3", "null"])
    elif kind == 4:
        bad = (np.array(["high"] * 4), np.zeros((4, 2)), np.array(1.0))
        broken["value recall@1"] = pick(random, bad)
    files = []
    for each in (arrays(), broken):
        file = io.BytesIO()
        np.savez(file, **each)
        files.append(file.getvalue())
    if kind == 5:
        files[1] = cut(random, files[1])
    elif kind == 6:
        files[1] = pick(random, [b"", garbage(random), b"PK\x05\x06" + b"\0" * 18])
    a, b = (put(folder / run, "queries.npz", file) for run, file in zip("ab", files, strict=True))

    def attempt() -> int:
        compare(read_records(a.parent), read_records(b.parent), resamples=10, seed=0)
        return 0

    return attempt


def _damage(random: Random, checkpoints: Path) -> None:
    """Damage what the last checkpoint is read from: the list of arrays, their index, or they."""
    items = checkpoints / "5" / "default"
    arrays = [path for path in items.rglob("d/*") if path.stat().st_size > 10_000]
    kind = int(random.integers(3))
    for victim in pick(random, [[items / "manifest.ocdbt"], [*items.glob("d/*")], arrays]):
        contents = victim.read_bytes()
        if kind == 0:
            victim.unlink()
        elif kind == 1:
            victim.write_bytes(cut(random, contents))
        else:
            victim.write_bytes(garbage(random, len(contents)))


def checkpoint_read(random: Random, folder: Path, *, run: Path) -> Attempt:
    """A file of the one checkpoint that is asked for."""
    from mmljax.training.checkpoints import PartialCheckpoint

    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    _damage(random, folder / "checkpoints")
    return lambda: PartialCheckpoint(folder / "checkpoints", step=5).check() or 0


def checkpoint_passed_over(random: Random, folder: Path, *, run: Path, state: Any) -> Attempt:
    """A file of the last checkpoint, on resuming: the checkpoint before is used."""
    from mmljax.training.checkpoints import TORN, Checkpoints

    directory = folder / "checkpoints"
    shutil.copytree(run / "checkpoints", directory)
    _damage(random, directory)

    def attempt() -> int:
        saved = Checkpoints(directory, keep_last=2, keep_best=0)
        try:
            restored = saved.restore(state)
        finally:
            saved.close()
        assert restored is not None
        assert int(restored.step) == 3
        return len(list((directory / TORN).iterdir()))

    return attempt


def embeddings(random: Random, folder: Path) -> Attempt:
    """A Parquet file of embeddings to search."""
    import pyarrow as pa
    from pyarrow import parquet

    from mmljax.inference.embedding_file import FORMAT, embeddings_table, read_gallery

    names, labels = np.array(["a", "b", "c"]), np.array([0, 1, 2], np.int32)
    dtype = pick(random, ["float32", "int8", "binary"])
    table = embeddings_table(names, labels, np.eye(3, 4, dtype=np.float32), dtype=dtype)
    made: Any = {"format": FORMAT, "embedding_size": 4, "rows": 3, "dtype": dtype}
    kind = int(random.integers(6))
    if kind == 0:
        table = table.drop_columns([pick(random, table.column_names)])
    elif kind == 1:
        made = made | {"embedding_size": pick(random, [5, 0, -4, "4", None, 2**40])}
    elif kind == 2:
        other = {"dtype": pick(random, ["int4", None, 8, "binary", "int8", "float32"])}
        made = pick(
            random, [{}, [], None, "text", {"format": FORMAT}, {"format": "o"}, made | other]
        )
    elif kind == 3:
        column = pick(random, [pa.array(["x"] * 3), pa.array([[1.0], [2.0], [3.0]]), pa.nulls(3)])
        table = table.set_column(2, "embedding", column)
        if dtype != "float32":
            numbers = pick(random, [[np.nan, 0, 1], [-1, 0, 1], [None, 0, 1], [0, 1, np.inf]])
            table = embeddings_table(names, labels, np.eye(3, 4, dtype=np.float32), dtype=dtype)
            place = table.column_names.index(name := pick(random, ["scale", "error"]))
            table = table.set_column(place, name, pa.array(numbers, pa.float32()))
    text = json.dumps(made)
    if kind == 4:
        text = pick(random, [cut(random, text.encode()).decode(), "", "{", "\0"])
    path = folder / "embeddings.parquet"
    parquet.write_table(table.replace_schema_metadata({"mmljax": text}), path)
    if kind == 5:
        contents = path.read_bytes()
        path.write_bytes(pick(random, [b"", b"PAR1", garbage(random), cut(random, contents)]))
    return lambda: len(read_gallery(path).ids) * 0
