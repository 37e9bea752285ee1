"""Scores of whole splits: ideal, adversarial and random embeddings, lone queries."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.evaluate import embed_batches, retrieval_scores
from mmljax.mesh import make_mesh
from mmljax.types import Batch


def score(*arguments: Any, devices: int = 2, recall_at: Any = (1, 2)) -> Any:
    return retrieval_scores(
        *arguments, recall_at=recall_at, chunk=8, mesh=make_mesh(jax.devices()[:devices])
    )


def test_ideal_embedding_has_every_score_one() -> None:
    labels = np.repeat(np.arange(5), 4).astype(np.int32)
    result = score(np.eye(5, dtype=np.float32)[labels], labels, None, None)
    assert set(result.scores) == {"recall@1", "recall@2", "r_precision", "map@r"}
    assert all(value == 1 for value in result.scores.values())
    assert result.lone_queries == 0
    assert result.chance == pytest.approx(3 / 19)


def test_adversarial_embedding_has_every_score_zero() -> None:
    """Each query is nearest to another item's image, and by an own one only last."""
    labels = np.array([0, 1, 2], np.int32)
    queries = np.eye(3, dtype=np.float32)
    result = score(queries, labels, -queries, labels)
    assert all(value == 0 for value in result.scores.values())


def test_hand_computed_query_against_gallery() -> None:
    queries = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    gallery = np.array([[0.9, 0.1], [0.8, 0.6], [0.1, 0.9], [0.0, 1.0]], np.float32)
    # Orders: query 0: 0 1 2 3; query 1: 3 2 1 0; query 2 has no image of its item.
    result = score(queries, np.array([7, 8, 9]), gallery, np.array([8, 7, 7, 8]))
    assert result.scores["recall@1"] == pytest.approx(0.5)  # query 1 finds row 3
    assert result.scores["recall@2"] == pytest.approx(1.0)
    assert result.scores["r_precision"] == pytest.approx((0.5 + 0.5) / 2)
    assert result.scores["map@r"] == pytest.approx((0.25 + 0.5) / 2)
    assert (result.queries, result.gallery, result.lone_queries) == (3, 4, 1)
    assert result.chance == pytest.approx(0.5)


@pytest.mark.parametrize("devices", [1, 8])
def test_random_embedding_is_near_chance(devices: int) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 20).astype(np.int32)
    vectors = random.normal(size=(400, 16)).astype(np.float32)
    result = score(vectors, labels, None, None, devices=devices)
    sigma = np.sqrt(result.chance * (1 - result.chance) / 400)
    assert abs(result.scores["recall@1"] - result.chance) < 4 * sigma


def test_recall_beyond_the_gallery_is_refused() -> None:
    labels = np.zeros(4, np.int32)
    with pytest.raises(UserError, match=r"recall_at asks for Recall@4.*only 3"):
        score(np.eye(4, dtype=np.float32), labels, None, None, recall_at=(1, 4))


def test_no_query_with_an_answer_is_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="no query has"):
        score(vectors, np.array([0, 1, 2]), vectors, np.array([3, 4, 5]))


def test_embed_batches_leaves_padding_out() -> None:
    def batch(values: list[float], valid: list[bool]) -> Batch:
        return Batch(np.array(values), np.array(values, np.int32), np.array(valid))

    batches = [batch([1, 2], [True, True]), batch([3, 0], [True, False])]
    vectors, labels = embed_batches(lambda images: images[:, None] * 10, batches)
    np.testing.assert_array_equal(vectors, [[10], [20], [30]])
    np.testing.assert_array_equal(labels, [1, 2, 3])
