"""Make the array file of ``configs/omniglot.py`` from the Omniglot background set.

    python -m benchmarks.omniglot --images omniglot_background_56.npz --out data/omniglot.npz

Alphabets 0 to 19 train, 20 to 29 test by self-retrieval. The 56 px images are averaged down to
28 px. Each training character turned by 90, 180 and 270 degrees is a further class, as is usual
with this set (Santoro et al. 2016, arXiv 1605.06065, section 4.1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def halve(images: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 block of uint8 ``[n h w]``, rounded."""
    n, h, w = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2).astype(np.uint16)
    return ((blocks.sum((2, 4)) + 2) // 4).astype(np.uint8)


def turn(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four quarter turns, each a class of its own."""
    classes = labels.max() + 1
    turned = [np.rot90(images, k, axes=(1, 2)) for k in range(4)]
    return np.concatenate(turned), np.concatenate([labels + k * classes for k in range(4)])


def split_arrays(images: np.ndarray, labels: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the file: train classes turned, test classes as they are."""
    _, train_labels = np.unique(labels[~test], return_inverse=True)
    train_images, train_labels = turn(images[~test], train_labels)
    return {
        "images": np.concatenate([train_images, images[test]]),
        "labels": np.concatenate([train_labels, labels[test] + train_labels.max() + 1]),
        "split": np.array(["train"] * len(train_labels) + ["query"] * int(test.sum())),
    }


def main() -> None:
    """Read, split, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="omniglot_background_56.npz")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = np.load(options.images)
    arrays = split_arrays(halve(data["images"]), data["labels"], data["alphabet"] >= 20)
    arrays["labels"] = arrays["labels"].astype(np.int32)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.out, **arrays)
    counts = {name: int(np.sum(arrays["split"] == name)) for name in ("train", "query")}
    print(f"{options.out}: {counts}")


if __name__ == "__main__":
    main()
