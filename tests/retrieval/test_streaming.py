"""Search in a gallery on the host or in a file: the same neighbours, read once, pages released."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.retrieval import search as retrieval
from mmljax.retrieval import streaming
from searches import DATA, SEARCHES, make, real_valued, stable_argsort


def mapped(path: Path, gallery: np.ndarray) -> np.ndarray:
    np.save(path, gallery)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("name", SEARCHES)
def test_streamed_neighbors_equal_a_stable_argsort(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "QUERY_BLOCK", 64)
    case = SEARCHES[name]
    for seed, kind in enumerate(DATA):
        queries, gallery, own = make(case, kind, seed)
        expected = stable_argsort(queries, gallery, own, case.k)
        for where in (gallery, mapped(tmp_path / f"{kind}.npy", gallery)):
            found = streaming.streamed_nearest_neighbors(
                queries, where, k=case.k, chunk=case.chunk, self_index=own
            )
            np.testing.assert_array_equal(found.indices, expected[1], kind)
            np.testing.assert_array_equal(found.similarity, expected[0], kind)


@pytest.mark.parametrize("chunk", [1, 640, 5000])
def test_streamed_search_is_the_plain_one_bit_for_bit(chunk: int) -> None:
    queries, gallery = real_valued()
    own = np.arange(70)
    plain = retrieval.nearest_neighbors(queries, gallery, k=7, chunk=640, self_index=own)
    found = streaming.streamed_nearest_neighbors(queries, gallery, k=7, chunk=chunk, self_index=own)
    np.testing.assert_array_equal(found.similarity, plain.similarity)
    np.testing.assert_array_equal(found.indices, plain.indices)


@pytest.mark.parametrize("kind", ["float64", "float16", "fortran", "every other row", "on device"])
def test_galleries_of_any_make(kind: str) -> None:
    queries, gallery = real_valued()
    half = gallery.astype(np.float16)
    given: Any = {
        "float64": gallery.astype(np.float64),
        "float16": half,
        "fortran": np.asfortranarray(gallery),
        "every other row": np.repeat(gallery, 2, axis=0)[::2],
        "on device": jax.device_put(gallery),
    }[kind]
    gallery = half.astype(np.float32) if kind == "float16" else gallery
    plain = retrieval.nearest_neighbors(queries, gallery, k=3, chunk=2000)
    found = streaming.streamed_nearest_neighbors(queries, given, k=3, chunk=300)
    np.testing.assert_array_equal(found.indices, plain.indices)
    np.testing.assert_array_equal(found.similarity, plain.similarity)


class Rows(np.ndarray):
    """Remembers which slices were asked for."""

    asked: list[slice]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            self.asked.append(key)
        return self.view(np.ndarray)[key]


def test_parts_are_read_once_in_order_and_padded() -> None:
    _, gallery = real_valued()
    rows = gallery.view(Rows)
    rows.asked = []
    parts = [
        (first, part[:3].copy(), part.shape, part[len(gallery) - first :].any())
        for first, part in streaming._parts(rows, 512, unit=False)
    ]
    assert [key.start for key in rows.asked] == [0, 512, 1024]
    for first, start, shape, padding in parts:
        np.testing.assert_array_equal(start, gallery[first : first + 3])
        assert shape == (512, 96)
        assert not padding


def resident(path: Path) -> int:
    """Kibibytes of a mapped file in this process's memory."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        pytest.skip("needs /proc/self/smaps")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    own = [part for part in parts if str(path) in part]
    assert own
    return sum(int(re.search(r"^Rss:\s+(\d+)", part, re.MULTILINE)[1]) for part in own)


@pytest.mark.parametrize("view", [False, True])
def test_pages_of_a_mapped_gallery_are_released(tmp_path: Path, view: bool) -> None:
    path = tmp_path / "gallery.npy"
    gallery = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    file = mapped(path, gallery)
    assert file.sum() != 0
    assert resident(path) > 4000  # all of it
    given = np.asarray(file)[7:] if view else file
    found = streaming.streamed_nearest_neighbors(gallery[7:39], given, k=1, chunk=2048)
    assert found.indices[:, 0].tolist() == list(range(32)) if view else list(range(7, 39))
    assert resident(path) < 200
    np.testing.assert_array_equal(file, gallery)  # they are read again when needed


def test_changes_in_a_private_map_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "gallery.npy"
    np.save(path, np.zeros((5000, 4), np.float32))
    private = np.load(path, mmap_mode="c")
    private[:] = 1
    for first, part in streaming._parts(private, 512, unit=False):
        assert part[: len(private) - first].all()
    assert private.all()
    assert isinstance(private.base, mmap.mmap)


def test_more_neighbours_than_the_gallery_holds_is_an_error() -> None:
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match=r"k=4 .* 3 rows"):
        streaming.streamed_nearest_neighbors(x, x, k=4, chunk=8)
    with pytest.raises(UserError, match=r"k=3 .* 2 rows besides each query itself"):
        streaming.streamed_nearest_neighbors(x, x, k=3, chunk=8, self_index=np.arange(3))
    with pytest.raises(UserError, match="embedding size: 3 and 2"):
        streaming.streamed_nearest_neighbors(x, x[:, :2], k=1, chunk=8)


def test_rows_are_refused_by_their_number_in_the_whole_gallery() -> None:
    queries, gallery = real_valued()
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    queries = gallery[:70]
    options: Any = {"k": 3, "chunk": 512, "unit": True}
    streaming.streamed_nearest_neighbors(queries, gallery, **options)
    for value, text in ((np.nan, "finite"), (1e300, "finite"), (3.0, "of unit length")):
        broken = gallery.astype(np.float64)
        broken[1100, 5] = value
        with pytest.raises(UserError, match=f"gallery embeddings are not {text}.* row 1100"):
            streaming.streamed_nearest_neighbors(queries, broken, **options)
    with pytest.raises(UserError, match="query embeddings are not of unit length: .* row 0, of"):
        streaming.streamed_nearest_neighbors(3 * queries, gallery, **options)
