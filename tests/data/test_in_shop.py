"""In-Shop folders as data sets, and every mistake in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.in_shop_list import PARTITION
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
    data = read_in_shop(tmp_path)
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
    data = read_in_shop(make(tmp_path, ROWS + extra))
    assert data.gallery is not None
    assert data.query.labels.tolist() == [2, 0, 3]  # items 7, 5, 9
    assert data.gallery.labels.tolist() == [2, 0, 1]  # items 7, 5, 6


@pytest.mark.parametrize("directory", ["", "absent"])
def test_absent_directory_names_the_flag_and_the_cure(tmp_path: Path, directory: str) -> None:
    path = directory and tmp_path / directory
    with pytest.raises(UserError, match="--config.data.directory=.*not a directory.*on request"):
        read_in_shop(path)


def test_absent_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list_eval_partition.txt cannot be read .*Img/ and Eval/"):
        read_in_shop(tmp_path)


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        ([*ROWS, "img/a.jpg id_1"], None, "line 10: 'img/a.jpg id_1' is not 'image_name"),
        ([*ROWS, "img/a b.jpg id_1 train"], None, "line 10: .* is not"),
        ([ROWS[0], "", *ROWS[1:]], None, "line 4: '' is not"),
        (ROWS, 6, "line 1: states '6' rows, but 7 follow"),
        (ROWS, "seven", "line 1: states 'seven' rows, but 7 follow"),
        ([*ROWS, "img/a.jpg id_1 test"], None, "line 10: evaluation_status 'test' is unknown"),
        ([*ROWS, ROWS[3].replace("img/", "img/./")], None, "line 10: img/MEN.* in line 6 too"),
        ([*ROWS, ROWS[3].replace("img/", "img//")], None, "line 10: img/MEN.* in line 6 too"),
        ([*ROWS, ROWS[3].replace("MEN/", "MEN/a/../")], None, r"line 10: .* or holds '\.\.'"),
        ([*ROWS, "img/../../a.jpg id_1 train"], None, "line 10: .* leaves the data directory"),
        ([*ROWS, "/etc/a.jpg id_1 train"], None, "line 10: .* leaves the data directory"),
        ([*ROWS, ROWS[3]], None, "line 10: .* is listed in line 6 too"),
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
        read_in_shop(tmp_path)
    assert "\n" not in str(error.value)


def test_paths_of_the_list_are_normalised(tmp_path: Path) -> None:
    plain = read_in_shop(make(tmp_path))
    write_list(tmp_path, [row.replace("img/", "./img/.//", 1) for row in ROWS])
    data = read_in_shop(tmp_path)
    for split, expected in zip(data[:3], plain[:3], strict=True):
        assert split.names.tolist() == expected.names.tolist()
        assert split.images.tolist() == expected.images.tolist()


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    """With the images of high resolution, ``img/`` of the list is read as ``img_highres/``."""
    rows = [*ROWS, ROWS[3].replace("img/", "img_highres/")]
    write_images(tmp_path, [row.replace("img/", "img_highres/", 1) for row in rows])
    write_list(tmp_path, rows)
    with pytest.raises(UserError, match="line 10: img_highres/MEN.* same file as .* of line 6"):
        read_in_shop(tmp_path, images="img_highres")


def test_list_without_its_header(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / PARTITION
    path.write_text("\n".join(["7", *ROWS]))
    with pytest.raises(UserError, match="line 2: must be 'image_name item_id evaluation_status'"):
        read_in_shop(tmp_path)


def test_absent_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    for row in (ROWS[3], ROWS[6], ROWS[4]):  # two folders, one of them emptied by a deletion
        (tmp_path / "Img" / row.split()[0]).unlink()
    (tmp_path / "Img/img/MEN/Shorts/id_00000001").rmdir()
    with pytest.raises(
        UserError, match=r"image img/MEN/Shorts/id_00000005/01_1.*line 6.*\(3 of 7 are absent\)"
    ):
        read_in_shop(tmp_path)


def test_a_folder_of_an_images_name_is_no_image(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "Img" / ROWS[0].split()[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"id_00000007/02_1_front.jpg .*line 3"):
        read_in_shop(tmp_path)


def test_real_photographs(tmp_path: Path) -> None:
    archive = SHARED / "data" / "grocery" / "grocery_inshop.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive}")
    with zipfile.ZipFile(archive) as file:
        text = file.read(PARTITION).decode()
    # The list is the real one; reading it needs the names of the images, not their bytes.
    write_images(tmp_path, text.splitlines()[2:])
    (tmp_path / "Eval").mkdir()
    (tmp_path / PARTITION).write_text(text)
    data = read_in_shop(tmp_path)
    assert data.gallery is not None
    sizes = [len(split.labels) for split in (data.train, data.query, data.gallery)]
    assert (sizes, data.classes, data.query.labels.max()) == ([2781, 1197, 1443], 41, 39)
