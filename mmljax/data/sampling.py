"""Which images each batch holds, as a pure function of ``(seed, step)``. NumPy only.

A training batch is P x K: P distinct classes, K images of each. Batches take the classes in turn
from a permutation, and from a new one when it is used up, so after any number of steps the counts
of two classes differ by at most one. An evaluation batch holds the images in their order. No state
is kept between batches, so a run may start at any step.

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

# Independent random streams of a seed.
_CLASSES, _IMAGES, _AUGMENTATION, COMPOSITION, REFRESH = range(5)


class ClassIndex(NamedTuple):
    """The images of each class: those of class c are ``order[offsets[c] : offsets[c + 1]]``."""

    order: Int[np.ndarray, " n"]  # image indices, sorted by label
    offsets: Int[np.ndarray, " classes_and_one"]


def class_index(labels: Int[np.ndarray, " n"]) -> ClassIndex:
    """Group images by label; a label without images is not a class here."""
    _, counts = np.unique(labels, return_counts=True)
    return ClassIndex(
        order=np.argsort(labels, kind="stable").astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def class_balanced_indices(
    index: ClassIndex, *, seed: int, step: int, batch_size: int, images_per_class: int
) -> Int[np.ndarray, " b"]:
    """Images of one P x K training batch, the K images of a class side by side.

    A class with fewer than K images repeats them evenly: their counts differ by at most one.

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
    numbers = generator(seed, _IMAGES, step)
    if 2 * chosen <= classes:
        drawn = _draw(classes, chosen, seed, step)
    else:  # draw the absent classes instead: all are then absent equally often
        absent = _draw(classes, classes - chosen, seed, step)
        drawn = numbers.permutation(np.delete(np.arange(classes), absent))
    sizes = index.offsets[drawn + 1] - index.offsets[drawn]
    within = choose_images(numbers, sizes, images_per_class)
    return index.order[index.offsets[drawn][:, None] + within].reshape(-1)


def check_batch(index: ClassIndex, *, batch_size: int, images_per_class: int) -> None:
    """Refuse a batch that the classes cannot fill.

    Raises:
      UserError: if ``batch_size`` is not a multiple of ``images_per_class``, or needs more classes
        than there are.
    """
    if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
        raise UserError(
            f"--config.data.batch_size={batch_size} is not a multiple of "
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
    """Uniform numbers in [0, 1) for each position of a batch, for its random augmentation."""
    return generator(seed, _AUGMENTATION, step).random((batch_size, count))


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Random numbers of a step, independent of other seeds, streams and steps."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number])))


@functools.lru_cache(maxsize=4)
def _shuffled(classes: int, seed: int, number: int) -> Int[np.ndarray, " classes"]:
    order = generator(seed, _CLASSES, number).permutation(classes)
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=4)
def _order(classes: int, count: int, seed: int, number: int) -> Int[np.ndarray, " classes"]:
    """The ``number``-th permutation of the classes, for batches of at most half of them.

    A batch that spans two permutations must hold no class twice. The classes that it takes from
    the end of the old permutation are moved back in the new one, within its first ``count``. The
    end of the new permutation stays as it was shuffled, which the next one relies on.
    """
    order = _shuffled(classes, seed, number)
    spanned = number * classes % max(count, 1)
    if not spanned:
        return order
    head = order[:count]
    taken = np.isin(head, _shuffled(classes, seed, number - 1)[-spanned:])
    order = np.concatenate([head[~taken], head[taken], order[count:]])
    order.setflags(write=False)
    return order


def _draw(classes: int, count: int, seed: int, step: int) -> Int[np.ndarray, " count"]:
    """The ``count`` classes of a step, in turn from one permutation after another."""
    number, start = divmod(step * count, classes)
    drawn = _order(classes, count, seed, number)[start : start + count]
    if len(drawn) < count:
        rest = _order(classes, count, seed, number + 1)[: count - len(drawn)]
        drawn = np.concatenate([drawn, rest])
    return drawn


def choose_images(
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
