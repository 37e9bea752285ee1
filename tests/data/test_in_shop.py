"""In-Shop folders, array files and arrays as data sets, and every mistake in them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmljax.data.readers import in_shop as sources
from mmljax.errors import UserError

SHARED = Path(__file__).parents[3] / "shared"

ROWS = [
    "img/WOMEN/Dresses/id_00000007/02_1_front.jpg  id_00000007 query  ",
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg      id_00000002 train  ",
    "img/WOMEN/Dresses/id_00000007/02_2_side.jpg id_00000007 gallery",
    "img/MEN/Shorts/id_00000005/01_1_front.jpg id_00000005 gallery",
    "img/MEN/Shorts/id_00000001/01_1_front.jpg id_00000001 train",
    "img/WOMEN/Dresses/id_00000002/02_2_side.jpg id_00000002 train",
    "img/MEN/Shorts/id_00000005/01_2_side.jpg id_00000005 query",
]
HEADER = "image_name item_id evaluation_status"


def write_list(root: Path, rows: list[str], *, count: object = None, newline: str = "\n") -> None:
    path = root / "Eval" / "list_eval_partition.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [str(len(rows) if count is None else count), HEADER, *rows, ""]
    path.write_bytes(newline.join(lines).encode())


def write_images(root: Path, rows: list[str], *, below: str = "Img") -> None:
    for row in rows:
        path = root / below / row.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not decoded here")


def make(root: Path, rows: list[str] = ROWS) -> Path:
    write_images(root, rows)
    write_list(root, rows)
    return root


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("below", ["Img", "."])
def test_in_shop_splits_paths_and_labels(tmp_path: Path, newline: str, below: str) -> None:
    write_images(tmp_path, ROWS, below=below)
    write_list(tmp_path, ROWS, newline=newline)
    data = sources.read_in_shop(tmp_path)
    assert data.classes == 2
    assert data.gallery is not None
    assert data.train.labels.tolist() == [1, 0, 1]  # items 2, 1, 2
    assert data.query.labels.tolist() == [1, 0]  # items 7, 5
    assert data.gallery.labels.tolist() == [1, 0]
    for split, rows in (
        (data.train, (1, 4, 5)),
        (data.query, (0, 6)),
        (data.gallery, (2, 3)),
    ):
        assert split.labels.dtype == np.int32
        assert split.names.tolist() == [ROWS[row].split()[0] for row in rows]
        assert [Path(p) for p in split.images] == [tmp_path / below / n for n in split.names]


def test_gallery_items_that_no_query_shows_are_numbered_with_the_rest(tmp_path: Path) -> None:
    extra = [
        "img/MEN/Shorts/id_00000006/01_1_front.jpg id_00000006 gallery",
        "img/MEN/Shorts/id_00000009/01_1_front.jpg id_00000009 query",
    ]
    data = sources.read_in_shop(make(tmp_path, ROWS + extra))
    assert data.gallery is not None
    assert data.query.labels.tolist() == [2, 0, 3]  # items 7, 5, 9
    assert data.gallery.labels.tolist() == [2, 0, 1]  # items 7, 5, 6


@pytest.mark.parametrize("directory", ["", "absent"])
def test_absent_directory_names_the_flag_and_the_cure(tmp_path: Path, directory: str) -> None:
    path = directory and tmp_path / directory
    with pytest.raises(UserError, match="--config.data.directory=.*no directory.*on request"):
        sources.read_in_shop(path)


def test_absent_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list_eval_partition.txt cannot be read .*Img/ and Eval/"):
        sources.read_in_shop(tmp_path)


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        ([*ROWS, "img/a.jpg id_1"], None, "line 10: 'img/a.jpg id_1' is not 'image_name"),
        ([*ROWS, "img/a b.jpg id_1 train"], None, "line 10: .* is not"),
        ([ROWS[0], "", *ROWS[1:]], None, "line 4: '' is not"),
        (ROWS, 6, "line 1: states '6' rows, but 7 follow"),
        (ROWS, "seven", "line 1: states 'seven' rows, but 7 follow"),
        ([*ROWS, "img/a.jpg id_1 test"], None, "line 10: evaluation_status 'test' is unknown"),
        ([*ROWS, "img/../../a.jpg id_1 train"], None, "line 10: .* leaves the data directory"),
        ([*ROWS, "/etc/a.jpg id_1 train"], None, "line 10: .* leaves the data directory"),
        ([*ROWS, ROWS[3]], None, "line 10: .* stands in line 6 too"),
        ([*ROWS, "img/a.jpg id_00000002 gallery"], None, "line 10: item id_00000002 is in gallery"),
        ([row for row in ROWS if " train" not in row], None, "no row is of split train"),
        ([row for row in ROWS if " gallery" not in row], None, "no row is of split gallery"),
        ([], None, "no row is of split train"),
    ],
)
def test_mistakes_in_the_list(tmp_path: Path, rows: list[str], count: object, message: str) -> None:
    write_images(tmp_path, ROWS)
    write_list(tmp_path, rows, count=count)
    with pytest.raises(UserError, match=message) as error:
        sources.read_in_shop(tmp_path)
    assert "\n" not in str(error.value)


def test_list_without_its_header(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / sources.PARTITION
    path.write_text("\n".join(["7", *ROWS]))
    with pytest.raises(UserError, match="line 2: must be 'image_name item_id evaluation_status'"):
        sources.read_in_shop(tmp_path)


def test_absent_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    for row in (ROWS[3], ROWS[6], ROWS[4]):  # two folders, one of them emptied by a deletion
        (tmp_path / "Img" / row.split()[0]).unlink()
    (tmp_path / "Img/img/MEN/Shorts/id_00000001").rmdir()
    with pytest.raises(
        UserError, match=r"image img/MEN/Shorts/id_00000005/01_1.*line 6.*\(3 of 7 are absent\)"
    ):
        sources.read_in_shop(tmp_path)


def test_a_folder_of_an_images_name_is_no_image(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "Img" / ROWS[0].split()[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"id_00000007/02_1_front.jpg .*line 3"):
        sources.read_in_shop(tmp_path)


def test_small_classes_are_counted() -> None:
    labels = np.array([3, 3, 0, 1, 1, 1, 7], np.int32)
    assert [sources.count_small_classes(labels, size=n) for n in (1, 2, 3, 4)] == [0, 2, 3, 4]


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(256, size=(7, 5, 4), dtype=np.uint8)
    return {
        "images": images,
        "labels": np.array([40, 7, 12, 7, 30, 12, 40]),
        "split": np.array(["query", "train", "train", "train", "query", "train", "query"]),
    } | changes


def write_npz(path: Path, **content: np.ndarray) -> Path:
    np.savez(path / "set.npz", **content)
    return path / "set.npz"


def test_array_file_without_gallery(tmp_path: Path) -> None:
    content = arrays()
    data = sources.read_arrays(write_npz(tmp_path, **content))
    assert (data.classes, data.gallery) == (2, None)
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.query.labels.tolist() == [1, 0, 1]
    assert data.query.names.tolist() == ["images[0]", "images[4]", "images[6]"]
    np.testing.assert_array_equal(data.query.images, content["images"][[0, 4, 6], :, :, None])


@pytest.mark.parametrize("kind", ["words", "bytes", "numbers"])
def test_array_file_with_gallery(tmp_path: Path, kind: str) -> None:
    words = arrays()["split"].astype("U7")
    words[6] = "gallery"
    split = {
        "words": words,
        "bytes": words.astype("S"),
        "numbers": np.array([["train", "query", "gallery"].index(w) for w in words], np.int8),
    }[kind]
    images = np.random.default_rng(1).integers(256, size=(7, 5, 4, 3), dtype=np.uint8)
    data = sources.read_arrays(write_npz(tmp_path, **arrays(images=images, split=split)))
    assert data.gallery is not None
    assert (data.query.labels.tolist(), data.gallery.labels.tolist()) == ([1, 0], [1])
    np.testing.assert_array_equal(data.gallery.images, images[6:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((7, 5, 4))}, "images must be uint8 .* found float64"),
        ({"images": np.zeros((7, 20), np.uint8)}, r"images must be uint8 .*\(7, 20\)"),
        ({"labels": np.arange(6)}, "labels must be 7 integers"),
        ({"labels": np.arange(7.0)}, "labels must be 7 integers.*float64"),
        ({"split": np.array(["train"])}, "split .* must have one entry per label"),
        ({"split": np.array(["train", "query", "val"] * 2 + ["train"])}, "split holds .*'val'"),
        ({"split": np.array([0, 1, 3, 0, 1, 0, 1])}, "split holds .*3"),
        ({"split": np.array(["train"] * 7)}, "marks no image as query"),
        ({"split": np.array(["query"] * 7)}, "marks no image as train"),
        ({"labels": np.array([40, 7, 12, 7, 12, 12, 40])}, "class 12 has images both"),
        ({"split": np.array(["train"] * 7, object)}, "cannot be read as arrays"),
    ],
)
def test_mistakes_in_an_array_file(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        sources.read_arrays(write_npz(tmp_path, **arrays(**changes)))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_array_file(tmp_path: Path) -> None:
    content = arrays()
    del content["split"]
    np.save(tmp_path / "one.npy", content["images"])
    (tmp_path / "text.npz").write_text("hello")
    whole = write_npz(tmp_path, **arrays()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write_npz(tmp_path, **content)  # set.npz, without the split
    for name in ("absent.npz", "one.npy", "text.npz", "cut.npz", "set.npz"):
        with pytest.raises(UserError, match="--config.data.directory=.*cannot be read as arrays"):
            sources.read_arrays(tmp_path / name)


def test_arrays_in_memory() -> None:
    images = np.random.default_rng(2).integers(256, size=(9, 6, 6), dtype=np.uint8)
    train, test, gallery = np.array([5, 9, 5]), np.array([9, 2]), np.array([2, 5, 9, 9])
    alone = sources.from_arrays(images[:3], train, images[3:5], test)
    assert (alone.classes, alone.gallery) == (2, None)
    assert alone.query.labels.tolist() == [1, 0]
    both = sources.from_arrays(
        images[:3], train, images[3:5], test, gallery_images=images[5:], gallery_labels=gallery
    )
    assert both.gallery is not None
    assert both.query.labels.tolist() == [2, 0]
    assert both.gallery.labels.tolist() == [0, 1, 2, 2]
    assert both.gallery.images.shape == (4, 6, 6, 1)
    with pytest.raises(UserError, match="both or not at all"):
        sources.from_arrays(images[:3], train, images[3:5], test, gallery_images=images[5:])


def test_arrays_need_no_tensorflow() -> None:
    code = "import sys, mmljax.data.readers.in_shop; print('tensorflow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_real_photographs(tmp_path: Path) -> None:
    archive = SHARED / "data" / "grocery" / "grocery_inshop.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive}")
    with zipfile.ZipFile(archive) as file:
        text = file.read(sources.PARTITION).decode()
    # The list is the real one; reading it needs the names of the images, not their bytes.
    write_images(tmp_path, text.splitlines()[2:])
    (tmp_path / "Eval").mkdir()
    (tmp_path / sources.PARTITION).write_text(text)
    data = sources.read_in_shop(tmp_path)
    assert data.gallery is not None
    sizes = [len(split.labels) for split in (data.train, data.query, data.gallery)]
    assert (sizes, data.classes, data.query.labels.max()) == ([2781, 1197, 1443], 41, 39)
