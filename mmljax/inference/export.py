"""Export the network of a run as one file that needs only jax and numpy, and check the file.

The file holds the pixel standardisation, the network with its weights and the normalisation to unit
length, for any number of images. ``embedder.json`` says how to load it and how images must be
cropped. ``receipt.json`` says whether the file, loaded in a process that can import nothing else,
gave the run's embeddings of real images: within ``TOLERANCE``, and with the same neighbours.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jax.export import Exported
from jaxtyping import Float, UInt8

from mmljax.data.load import eval_batches
from mmljax.errors import UserError
from mmljax.files import replacing, write_atomically
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.retrieval.search import nearest_neighbors
from mmljax.text import as_json, one_line
from mmljax.types import Split

ARTEFACT, DESCRIPTION, RECEIPT = "embedder.jax", "embedder.json", "receipt.json"
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5
NEIGHBORS = 10

ALLOWED = ("jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy")
"""What the check may import beside the standard library: jax, numpy and what these need."""

LOADING = """\
import jax, jax.export, numpy as np
with open("embedder.jax", "rb") as file:
    embed = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
images = np.zeros((1, {size}, {size}, {channels}), np.uint8)  # crops; see "images"
embeddings = np.asarray(embed(images))  # [n {dimension}] float32, of unit length"""

ALONE = """\
import importlib.abc, sys

class Only(importlib.abc.MetaPathFinder):
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        part = top.startswith(("_sysconfigdata", "jax_", "nvidia", "libtpu"))  # Python's, plugins
        if not part and top not in sys.stdlib_module_names and top not in {allowed!r}:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec), None)

sys.meta_path[:] = [Only()]
for name in {blocked!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} could be imported")
"""
"""Python that lets a process import only the standard library and what is named."""

CHECK = (
    ALONE
    + """\
import jax, jax.export, numpy as np
with open({artefact!r}, "rb") as file:
    embed = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
images = np.load("images.npy")
parts = np.split(images, range(1, len(images), {batch}))
np.save("vectors.npy", np.concatenate([np.asarray(embed(part)) for part in parts]))
"""
)


class Lowered(NamedTuple):
    """An exported network."""

    exported: Exported
    refused: dict[str, str]  # platform: why it could not be lowered for it


def lower(trained: TrainedEmbedder) -> Lowered:
    """Lower ``uint8 [b s s ch] -> float32 [b d]``, for any ``b``, for all possible platforms."""
    weights = jax.tree.map(np.asarray, (trained.network, trained.model_state))

    def embed(images: jax.Array) -> jax.Array:
        return nnx.merge(trained.graphdef, *weights)(images, train=False).astype(jnp.float32)

    (batch,) = export.symbolic_shape("b")
    size = trained.config.data.image_size
    images = jax.ShapeDtypeStruct((batch, size, size, trained.channels), np.uint8)

    def attempt(platforms: Sequence[str]) -> Exported:
        return export.export(jax.jit(embed), platforms=platforms)(images)

    refusals = (NotImplementedError, ValueError, RuntimeError)
    with contextlib.suppress(*refusals):
        return Lowered(attempt(PLATFORMS), {})
    refused = {}
    for platform in PLATFORMS[1:]:
        try:
            attempt((PLATFORMS[0], platform))
        except refusals as error:
            refused[platform] = one_line(error)
    return Lowered(attempt([p for p in PLATFORMS if p not in refused]), refused)


def describe(trained: TrainedEmbedder, lowered: Lowered) -> dict[str, Any]:
    """The contents of ``embedder.json``."""
    data, size = trained.config.data, trained.identity["embedding_size"]
    return {
        **trained.identity,
        **interface(trained),
        "platforms": list(lowered.exported.platforms),
        "refused_platforms": lowered.refused,
        "calling_convention": lowered.exported.calling_convention_version,
        "jax": jax.__version__,
        "needs": ["jax", "numpy", "flatbuffers"],
        "load": LOADING.format(
            size=data.image_size, channels=trained.channels, dimension=size
        ).splitlines(),
    }


def interface(trained: TrainedEmbedder) -> dict[str, str]:
    """What the exported function takes and returns, in words."""
    data = trained.config.data
    colours = "red, green, blue" if trained.channels == 3 else f"{trained.channels} channels"
    return {
        "images": f"uint8 [n {data.image_size} {data.image_size} {trained.channels}], {colours}, "
        f"0 to 255: the short side resized to {data.resize_size} pixels ({data.resampling}, "
        "antialiased, the long side rounded down), then the central "
        f"{data.image_size} x {data.image_size} pixels",
        "embeddings": f"float32 [n {trained.identity['embedding_size']}], of unit length: inner "
        "products are cosines",
    }


def embed_crops(
    trained: TrainedEmbedder, split: Split
) -> tuple[UInt8[np.ndarray, "n s s ch"], Float[np.ndarray, "n d"]]:
    """The evaluation's crops of some images, and the run's embeddings of them.

    They are embedded as in :func:`embed_in_clean_process`, the first one by itself: in bfloat16 the
    rounding of a network depends on the number of images in a call.
    """
    crops = np.concatenate(
        [
            np.asarray(batch.images)[np.asarray(batch.valid)]
            for batch in eval_batches(split, trained.config, trained.mesh)
        ]
    )
    parts = np.split(crops, range(1, len(crops), trained.config.data.eval_batch_size))
    return crops, np.concatenate(
        [np.asarray(trained.embed(jnp.asarray(part)), np.float32) for part in parts]
    )


def embed_in_clean_process(
    artefact: Path, crops: UInt8[np.ndarray, "n s s ch"], *, batch: int
) -> Float[np.ndarray, "n d"]:
    """Embeddings by the file, in a process in another folder that can import only jax and numpy.

    Args:
      artefact: the exported network.
      crops: the images; the first is embedded by itself.
      batch: how many of the others are embedded at once.

    Raises:
      UserError: if the process fails.
    """
    code = CHECK.format(
        allowed=ALLOWED,
        blocked=("mmljax", "flax", "optax", "orbax", "tensorflow"),
        artefact=str(artefact.resolve()),
        batch=batch,
    )
    return run_alone(code, crops, artefact=artefact)


def run_alone(
    code: str, crops: UInt8[np.ndarray, "n s s ch"], *, artefact: Path
) -> Float[np.ndarray, "*n d"]:
    """Run Python in a folder of its own, from ``images.npy`` to ``vectors.npy``.

    Raises:
      UserError: if the process fails; names the artefact.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process may hold the device
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", crops)
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"{artefact} cannot be loaded in a process of its own: {last}")
        return np.load(Path(folder) / "vectors.npy")


def parity(live: Float[np.ndarray, "n d"], reloaded: Float[np.ndarray, "n d"]) -> dict[str, Any]:
    """How two networks' embeddings of the same images differ."""
    k = min(NEIGHBORS, len(live) - 1)
    own = np.arange(len(live), dtype=np.int32)
    first, second = (
        np.asarray(nearest_neighbors(x, x, k=k, chunk=4096, self_index=own).indices)
        for x in (live, reloaded)
    )
    difference = float(np.max(np.abs(live.astype(np.float64) - reloaded)))
    same = int(np.sum(np.all(first == second, axis=1)))
    return {
        "images": len(live),
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "neighbors": k,
        "queries_with_equal_neighbors": same,
        "holds": difference <= TOLERANCE and same == len(live),
    }


def export_run(trained: TrainedEmbedder, split: Split, folder: Path) -> dict[str, Any]:
    """Write the three files, the receipt last, and return the receipt; see ``files.replacing``.

    Args:
      trained: the network.
      split: at least two images for the check.
      folder: made if absent.

    Raises:
      UserError: if the folder cannot be written or another export writes it, an image cannot be
        read, or the file cannot be loaded.
    """
    with replacing(folder, (ARTEFACT, DESCRIPTION, RECEIPT), flag="--output") as partial:
        return _export(trained, split, partial)


def _export(trained: TrainedEmbedder, split: Split, folder: Path) -> dict[str, Any]:
    lowered = lower(trained)
    write_atomically(folder / ARTEFACT, bytes(lowered.exported.serialize()))
    write_atomically(folder / DESCRIPTION, as_json(describe(trained, lowered)))
    crops, live = embed_crops(trained, split)
    batch = trained.config.data.eval_batch_size
    reloaded = embed_in_clean_process(folder / ARTEFACT, crops, batch=batch)
    receipt = {
        **trained.identity,
        **parity(live, reloaded),
        "checked_on": jax.default_backend(),
        "could_import": list(ALLOWED),
        "jax": jax.__version__,
    }
    write_atomically(folder / RECEIPT, as_json(receipt))
    return receipt
