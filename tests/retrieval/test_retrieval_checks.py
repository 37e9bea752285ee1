"""Embeddings, searches and evaluations that must fail are refused before any work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.config import RerankConfig
from mmljax.errors import UserError
from mmljax.retrieval.checks import check_embeddings, check_evaluation, relevant_counts
from mmljax.types import Dataset, Split


def unit_vectors(rows: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_unit_vectors_of_every_type_pass(dtype: str) -> None:
    check_embeddings(unit_vectors(5000).astype(dtype), name="gallery", unit=True)
    check_embeddings(jnp.asarray(unit_vectors(50), jnp.bfloat16), name="gallery", unit=True)


def test_the_first_refused_row_is_named_also_in_a_file(tmp_path: Path) -> None:
    x = unit_vectors(9000)
    x[[8500, 8999], 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for vectors in (x, mapped, jnp.asarray(x)):
        with pytest.raises(UserError, match="2 of 9000 gallery .* not finite: .* row 8500; again"):
            check_embeddings(vectors, name="gallery", cure="again")
    with pytest.raises(UserError, match="row 8600;"):
        check_embeddings(x, name="gallery", first=100)


@pytest.mark.parametrize(("length", "shown"), [(0.0, "0"), (0.98, "0.98"), (7.0, "7")])
def test_rows_of_another_length_are_refused_where_unit_length_is_asked(
    length: float, shown: str
) -> None:
    x = unit_vectors(30)
    x[12] *= length
    check_embeddings(x, name="query")
    for vectors in (x, jnp.asarray(x)):
        with pytest.raises(
            UserError, match=f"1 of 30 .*unit length: .* row 12, of length {shown};"
        ):
            check_embeddings(vectors, name="query", unit=True)


def test_no_row_is_no_error() -> None:
    check_embeddings(np.zeros((0, 4)), name="query", unit=True)


def test_relevant_counts_equal_the_loop() -> None:
    random = np.random.default_rng(0)
    query, gallery = random.integers(0, 9, 40), random.integers(2, 12, 30)
    expected = [sum(g == q for g in gallery) for q in query]
    assert relevant_counts(query, gallery).tolist() == expected
    own = [sum(other == q for other in query) - 1 for q in query]
    assert relevant_counts(query, None).tolist() == own
    assert relevant_counts(query, gallery[:0]).tolist() == [0] * 40


def split(labels: list[int]) -> Split:
    names = np.arange(len(labels)).astype(str)
    return Split(np.zeros((len(labels), 2, 2, 1), np.uint8), np.array(labels, np.int32), names)


def evaluation(
    query: list[int],
    gallery: list[int] | None,
    *,
    recall_at: tuple[int, ...],
    rerank: RerankConfig | None = None,
) -> tuple[Dataset, Any]:
    dataset = Dataset(split([0]), split(query), gallery and split(gallery), classes=1)
    config = SimpleNamespace(
        evaluation=SimpleNamespace(
            recall_at=recall_at, clustering=False, rerank=rerank or RerankConfig()
        ),
    )
    return dataset, config


@pytest.mark.parametrize(
    ("gallery", "options", "text"),
    [
        (None, {"methods": ("query_expansio",)}, "methods has 'query_expansio'; did you mean"),
        (None, {"methods": ("k_reciprocal",) * 2, "k1": 2, "k2": 2}, "names one twice; remove it"),
        (None, {"methods": ("query_expansion",), "k": 4}, "k=4, but an image has only 3 to"),
        ([1, 2], {"methods": ("query_expansion",), "k": 3}, "k=3, but an image has only 2 to"),
        (None, {"methods": ("database_augmentation",), "k": 4}, "k=4, but an image has only 3"),
        ([1, 2], {"methods": ("database_augmentation",), "k": 2}, "k=2, but an image has only 1"),
        (None, {"methods": ("k_reciprocal",), "k1": 4, "k2": 4}, "k1=4, but an image has only 3"),
        ([1, 2], {"methods": ("k_reciprocal",), "k1": 5, "k2": 7}, "k2=7, but an .* only 6"),
    ],
)
def test_second_stages_beyond_the_images_are_refused(
    gallery: list[int] | None, options: Any, text: str
) -> None:
    query = [1, 1, 2, 2]
    with pytest.raises(UserError, match=rf"--config\.evaluation\.rerank\..*{text}"):
        check_evaluation(
            *evaluation(query, gallery, recall_at=(1,), rerank=RerankConfig(**options))
        )
    fitting = options | {name: options[name] - 1 for name in ("k", "k1", "k2") if name in options}
    fitting |= {"methods": options["methods"][:1]}
    if fitting["methods"] != ("query_expansio",):
        check_evaluation(
            *evaluation(query, gallery, recall_at=(1,), rerank=RerankConfig(**fitting))
        )


@pytest.mark.parametrize("gallery", [None, [1, 2, 3]])
def test_an_evaluation_without_recall_at_1_passes(gallery: list[int] | None) -> None:
    check_evaluation(*evaluation([1, 1, 2, 2], gallery, recall_at=(2, 3)))


@pytest.mark.parametrize(
    ("query", "gallery", "options", "text"),
    [
        ([1, 1, 2], None, {"recall_at": (1, 3)}, "Recall@3, but a query has only 2"),
        ([1, 1, 2], [1, 2], {"recall_at": (3,)}, "Recall@3, but a query has only 2"),
        ([1, 1, 2], None, {"recall_at": (1, 0)}, r"recall_at must hold .* at least 1.*\(1, 0\)"),
        ([1, 1, 2], None, {"recall_at": ()}, "recall_at must hold"),
        ([1, 2, 3], None, {"recall_at": (1,)}, "no query has an image of its item"),
        ([1, 2, 3], [4, 5], {"recall_at": (1,)}, "no query has an image of its item"),
    ],
)
def test_an_evaluation_that_must_fail_is_refused(
    query: list[int], gallery: list[int] | None, options: Any, text: str
) -> None:
    with pytest.raises(UserError, match=text) as error:
        check_evaluation(*evaluation(query, gallery, **options))
    assert "\n" not in str(error.value)
