"""Which images each batch holds, as a pure function of ``(seed, step)``. NumPy only.

A training batch is P x K: P distinct classes, K images of each. Classes are dealt like cards from
a pack that is reshuffled whenever it is used up, so after any number of steps no class has been
seen more than once more often than another. An evaluation batch holds the images in their order.
Nothing is carried from one batch to the next, so a run may start at any step.

>>> index = class_index(np.array([0, 0, 1, 1, 1, 2, 2]))
>>> batch = class_balanced_indices(index, seed=0, step=5, batch_size=4, images_per_class=2)
>>> len(set(batch.tolist()))
4
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mmljax.errors import UserError

_PACK, _IMAGES, _AUGMENTATION = range(3)  # the independent streams of random numbers of a seed


class ClassIndex(NamedTuple):
    """The images of each class: those of class c are ``order[offsets[c] : offsets[c + 1]]``."""

    order: Int[np.ndarray, " n"]  # image indices, sorted by label
    offsets: Int[np.ndarray, " classes_and_one"]


def class_index(labels: Int[np.ndarray, " n"]) -> ClassIndex:
    """Group images by label; labels that occur in no image are no classes here."""
    _, counts = np.unique(labels, return_counts=True)
    return ClassIndex(
        order=np.argsort(labels, kind="stable").astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def class_balanced_indices(
    index: ClassIndex, *, seed: int, step: int, batch_size: int, images_per_class: int
) -> Int[np.ndarray, " b"]:
    """Images of one P x K training batch, the K of a class side by side.

    A class with fewer than K images gives each of them as often as the others, within one.

    Args:
      index: from ``class_index``.
      seed: not negative; batches of other seeds are independent.
      step: number of the batch, from 0.
      batch_size: P x K.
      images_per_class: K.

    Returns:
      int64 indices into the labels that ``index`` was made from.

    Raises:
      UserError: as ``check_batch``.
    """
    check_batch(index, batch_size=batch_size, images_per_class=images_per_class)
    classes, chosen = len(index.offsets) - 1, batch_size // images_per_class
    numbers = _generator(seed, _IMAGES, step)
    if 2 * chosen <= classes:
        drawn = _deal(classes, chosen, seed, step)
    else:  # deal the classes that sit this batch out: they too then come round equally often
        absent = _deal(classes, classes - chosen, seed, step)
        drawn = numbers.permutation(np.delete(np.arange(classes), absent))
    sizes = index.offsets[drawn + 1] - index.offsets[drawn]
    within = _choose(numbers, sizes, images_per_class)
    return index.order[index.offsets[drawn][:, None] + within].reshape(-1)


def check_batch(index: ClassIndex, *, batch_size: int, images_per_class: int) -> None:
    """Refuse a batch that the classes cannot fill.

    Raises:
      UserError: if ``batch_size`` is no multiple of ``images_per_class``, or if it asks for more
        classes than there are.
    """
    if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
        raise UserError(
            f"--config.data.batch_size={batch_size} is no multiple of "
            f"--config.data.images_per_class={images_per_class}; "
            "choose a batch size that is a whole number of classes times the images per class"
        )
    classes, chosen = len(index.offsets) - 1, batch_size // images_per_class
    if chosen > classes:
        raise UserError(
            f"--config.data.batch_size={batch_size} with --config.data.images_per_class="
            f"{images_per_class} asks for {chosen} classes in a batch, but the training split has "
            f"{classes}; lower the batch size to at most {classes * images_per_class} or raise the "
            "images per class"
        )


def ordered_indices(images: int, *, batch_size: int, step: int) -> Int[np.ndarray, " b"]:
    """Images of one evaluation batch, in order; -1 pads the last one to ``batch_size``."""
    indices = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.where(indices < images, indices, -1)


def augmentation_numbers(
    count: int, *, seed: int, step: int, batch_size: int
) -> Float[np.ndarray, "b count"]:
    """Uniform numbers in [0, 1) for each position of a batch; all that an augmentation draws."""
    return _generator(seed, _AUGMENTATION, step).random((batch_size, count))


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number])))


@functools.lru_cache(maxsize=4)
def _shuffled(classes: int, seed: int, number: int) -> Int[np.ndarray, " classes"]:
    order = _generator(seed, _PACK, number).permutation(classes)
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=4)
def _pack(classes: int, count: int, seed: int, number: int) -> Int[np.ndarray, " classes"]:
    """The pack's order in its ``number``-th use, ``count`` (at most half of it) to a batch.

    The batch that straddles two packs must hold no class twice. Its cards from the old pack are
    the last of the old shuffle, and are moved back in the new one, within its first ``count``
    cards. That leaves the end of the new pack as it was shuffled, which is what the next one asks.
    """
    order = _shuffled(classes, seed, number)
    straddling = number * classes % max(count, 1)
    if not straddling:
        return order
    head = order[:count]
    taken = np.isin(head, _shuffled(classes, seed, number - 1)[-straddling:])
    order = np.concatenate([head[~taken], head[taken], order[count:]])
    order.setflags(write=False)
    return order


def _deal(classes: int, count: int, seed: int, step: int) -> Int[np.ndarray, " count"]:
    number, start = divmod(step * count, classes)
    hand = _pack(classes, count, seed, number)[start : start + count]
    if len(hand) < count:
        rest = _pack(classes, count, seed, number + 1)[: count - len(hand)]
        hand = np.concatenate([hand, rest])
    return hand


def _choose(
    numbers: np.random.Generator, sizes: Int[np.ndarray, " p"], count: int
) -> Int[np.ndarray, "p count"]:
    """``count`` of ``range(size)`` for each size: distinct, or all of them in turn if too few.

    Floyd's sampling without replacement, for all sizes at once (Bentley and Floyd, A sample of
    brilliance, Communications of the ACM 30(9), 1987): every subset is equally likely.
    """
    uniform = numbers.random((len(sizes), count))
    chosen = np.empty((len(sizes), count), np.int64)
    for k in range(count):
        last = np.maximum(sizes - count + k, 0)
        pick = (uniform[:, k] * (last + 1)).astype(np.int64)
        repeated = (chosen[:, :k] == pick[:, None]).any(axis=1)
        chosen[:, k] = np.where(repeated, last, pick)
    in_turn = (np.arange(count) + chosen[:, :1]) % sizes[:, None]
    return np.where(sizes[:, None] < count, in_turn, chosen)
