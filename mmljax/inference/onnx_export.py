"""Export the network of a run as an ONNX file, and check the file in onnxruntime.

The network is computed in float32. The file is published only if onnxruntime on the CPU, in a
process that can import neither jax nor this package, gives the embeddings that the network has here
in float32: within ``TOLERANCE`` at every size of a batch, and with the same neighbours.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from mmljax.errors import UserError
from mmljax.files import replacing, write_atomically
from mmljax.inference.embedder import TrainedEmbedder, in_float32
from mmljax.inference.export import (
    ALONE,
    NEIGHBORS,
    TOLERANCE,
    embed_crops,
    interface,
    run_alone,
)
from mmljax.inference.onnx_graph import OPSET, to_onnx
from mmljax.inference.onnx_operators import OPERATORS
from mmljax.text import as_json
from mmljax.types import Split

ARTEFACT, DESCRIPTION, RECEIPT = "embedder.onnx", "onnx.json", "onnx_receipt.json"
BATCHES = (1, 3, 64)
NEAR_COPIES = 1e-5
"""Images whose similarities to a query differ by at most this much may swap places."""

ALLOWED = ("onnxruntime", "numpy")
"""What the check may import beside the standard library."""

LOADING = """\
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("embedder.onnx", providers=["CPUExecutionProvider"])
images = np.zeros((1, {size}, {size}, {channels}), np.uint8)  # crops; see "images"
(embeddings,) = session.run(None, {{"images": images}})  # [n {dimension}] float32, of unit length
print(embeddings @ embeddings.T)  # cosines"""

CHECK = (
    ALONE
    + """\
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession({artefact!r}, providers=["CPUExecutionProvider"])
images, found = np.load("images.npy"), []
for batch in {batches!r}:
    parts = np.split(images, range(batch, len(images), batch))
    last = np.resize(parts[-1], (batch, *images.shape[1:]))  # its images again, to a whole batch
    parts[-1], count = last, len(parts[-1])
    vectors = [session.run(None, {{"images": part}})[0] for part in parts]
    found.append(np.concatenate([*vectors[:-1], vectors[-1][:count]]))
np.save("vectors.npy", found)
"""
)


def export_run(trained: TrainedEmbedder, split: Split, folder: Path) -> dict[str, Any]:
    """Write the file, its description and its receipt, and return the receipt.

    Nothing is written, and earlier files stay, if the receipt does not hold.

    Args:
      trained: the network.
      split: at least two images for the check.
      folder: made if absent.

    Raises:
      UserError: if the network has an operation without an ONNX form or is too large, the folder
        cannot be written or another export writes it, or onnxruntime refuses the file.
    """

    try:
        with replacing(folder, (ARTEFACT, DESCRIPTION, RECEIPT), flag="--output") as partial:
            receipt = _export(in_float32(trained), split, partial)
            if not receipt["holds"]:
                raise _Refused
    except _Refused:
        pass
    return receipt


class _Refused(Exception):
    """The receipt does not hold, so the old files stay."""


def lower(trained: TrainedEmbedder) -> bytes:
    """The ONNX file of a network that is computed in float32."""
    weights = jax.tree.map(np.asarray, (trained.network, trained.model_state))

    def embed(images: jax.Array) -> jax.Array:
        return nnx.merge(trained.graphdef, *weights)(images, train=False)

    facts = {**trained.identity, **interface(trained)}
    return to_onnx(
        embed,
        size=trained.config.data.image_size,
        channels=trained.channels,
        operators=OPERATORS,
        metadata={key: str(value) for key, value in facts.items()},
    )


def embed_in_onnxruntime(
    artefact: Path, crops: UInt8[np.ndarray, "n s s ch"]
) -> Float[np.ndarray, "batches n d"]:
    """Embeddings by the file in batches of each of ``BATCHES``, in a process of its own.

    Raises:
      UserError: if onnxruntime refuses the file.
    """
    code = CHECK.format(
        allowed=ALLOWED,
        blocked=("mmljax", "jax", "flax", "onnx", "tensorflow"),
        artefact=str(artefact.resolve()),
        batches=BATCHES,
    )
    return run_alone(code, crops, artefact=artefact)


def compare(
    own: Float[np.ndarray, "n d"],
    others: Float[np.ndarray, "batches n d"],
    names: Any,
) -> dict[str, Any]:
    """How the embeddings of each batch size differ from the network's own.

    Neighbours that differ are ``near_copies`` where the two images have, by the network's own
    embeddings, similarities to the query that differ by at most ``NEAR_COPIES``; else
    ``other_neighbors``. Each is ``[query, own neighbour, the file's]``, by name.
    """
    finite = bool(np.isfinite(others).all())
    wide = own.astype(np.float64)
    similarities = wide @ wide.T
    first = _neighbors(wide)
    near: set[tuple[str, str, str]] = set()
    other: set[tuple[str, str, str]] = set()
    for vectors in others if finite else ():
        second = _neighbors(vectors.astype(np.float64))
        for query, place in np.argwhere(first != second):
            a, b = first[query, place], second[query, place]
            swapped = abs(similarities[query, a] - similarities[query, b]) <= NEAR_COPIES
            (near if swapped else other).add((str(names[query]), str(names[a]), str(names[b])))
    differences = {
        str(size): float(np.max(np.abs(wide - vectors)))
        for size, vectors in zip(BATCHES, others, strict=True)
    }
    close = finite and max(differences.values()) <= TOLERANCE
    return {
        "images": len(own),
        "largest_difference": differences if finite else None,  # by the size of a batch
        "tolerance": TOLERANCE,
        "neighbors": first.shape[1],
        "near_copies": sorted(near),
        "other_neighbors": sorted(other),
        "holds": close and not other,
    }


def _neighbors(vectors: Float[np.ndarray, "n d"]) -> np.ndarray:
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")
    return order[:, : min(NEIGHBORS, len(vectors) - 1)]


def _export(trained: TrainedEmbedder, split: Split, folder: Path) -> dict[str, Any]:
    data = trained.config.data
    artefact = lower(trained)
    write_atomically(folder / ARTEFACT, artefact)
    loading = LOADING.format(
        size=data.image_size,
        channels=trained.channels,
        dimension=trained.identity["embedding_size"],
    )
    description = {
        **trained.identity,
        **interface(trained),
        "needs": list(ALLOWED),
        "load": loading.splitlines(),
    }
    write_atomically(folder / DESCRIPTION, as_json(description))
    crops, own = embed_crops(trained, split)
    if not np.isfinite(own).all():
        raise UserError("the run's embeddings of the check images are not finite")
    receipt = {
        **trained.identity,
        **compare(own, embed_in_onnxruntime(folder / ARTEFACT, crops), split.names),
        "checked_on": "onnxruntime, CPUExecutionProvider",
        "compared_with": f"the network in float32, {jax.default_backend()}",
        "could_import": list(ALLOWED),
        "sha256": hashlib.sha256(artefact).hexdigest(),
        "opset": OPSET,
        "converter": f"mmljax {version('mmljax')}",
        **{name: version(name) for name in ("jax", "onnx", "onnxruntime")},
    }
    write_atomically(folder / RECEIPT, as_json(receipt))
    return receipt
