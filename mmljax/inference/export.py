"""``python -m mmljax.inference.export``: the network of a run as one file that needs jax and numpy alone.

What is exported is the standardisation of pixels, the network and the unit length, with the weights
in it, for any number of images. ``embedder.json`` says how to load it and how images must be
cropped. ``receipt.json`` tells whether the file, loaded in a process that can import nothing else,
gave the run's embeddings of real images: within ``TOLERANCE``, and with the same neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.errors import UserError
from mmljax.inference import embed as offline

if TYPE_CHECKING:
    from jax.export import Exported

    from mmljax.inference.embedder import TrainedEmbedder
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

CHECK = """\
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
import jax, jax.export, numpy as np
with open({artefact!r}, "rb") as file:
    embed = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
images = np.load("images.npy")
parts = np.split(images, range(1, len(images), {batch}))
np.save("vectors.npy", np.concatenate([np.asarray(embed(part)) for part in parts]))
"""


class Lowered(NamedTuple):
    """An exported network."""

    exported: Exported
    refused: dict[str, str]  # platform: why it could not be lowered for it


def lower(trained: TrainedEmbedder) -> Lowered:
    """``uint8 [b s s ch] -> float32 [b d]``, ``b`` free, for all platforms that take it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import export

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
            refused[platform] = " ".join(str(error).split())[:200]
    return Lowered(attempt([p for p in PLATFORMS if p not in refused]), refused)


def describe(trained: TrainedEmbedder, lowered: Lowered) -> dict[str, Any]:
    """What ``embedder.json`` holds."""
    import jax

    data, size = trained.config.data, trained.identity["embedding_size"]
    colours = "red, green, blue" if trained.channels == 3 else f"{trained.channels} channels"
    return {
        **trained.identity,
        "images": f"uint8 [n {data.image_size} {data.image_size} {trained.channels}], {colours}, "
        f"0 to 255: the short side resized to {data.resize_size} pixels (bilinear, antialiased, "
        f"the long side rounded down), then the central {data.image_size} x {data.image_size} "
        "pixels",
        "embeddings": f"float32 [n {size}], of unit length: inner products are cosines",
        "platforms": list(lowered.exported.platforms),
        "refused_platforms": lowered.refused,
        "calling_convention": lowered.exported.calling_convention_version,
        "jax": jax.__version__,
        "needs": ["jax", "numpy", "flatbuffers"],
        "load": LOADING.format(
            size=data.image_size, channels=trained.channels, dimension=size
        ).splitlines(),
    }


def embed_crops(trained: TrainedEmbedder, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation's crops ``[n s s ch]`` of some images, and the run's embeddings of them.

    They are embedded as :func:`embed_in_clean_process` does it, the first one by itself: in
    bfloat16 how a network rounds depends on how many images it is given at once.
    """
    import jax.numpy as jnp

    from mmljax.data.load import eval_batches

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


def embed_in_clean_process(artefact: Path, crops: np.ndarray, *, batch: int) -> np.ndarray:
    """What the file gives in a process that can import jax and numpy alone, in another folder.

    Args:
      artefact: the exported network.
      crops: ``[n s s ch]``; the first is embedded by itself.
      batch: of the others, how many at once.

    Raises:
      UserError: if it gives nothing.
    """
    code = CHECK.format(
        allowed=ALLOWED,
        blocked=("mmljax", "flax", "optax", "orbax", "tensorflow"),
        artefact=str(artefact.resolve()),
        batch=batch,
    )
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
            raise UserError(f"{artefact} cannot be used in a process of its own: {last}")
        return np.load(Path(folder) / "vectors.npy")


def parity(live: np.ndarray, reloaded: np.ndarray) -> dict[str, Any]:
    """How two networks' embeddings of the same images ``[n d]`` differ."""
    from mmljax.retrieval.search import nearest_neighbors

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
    """Write the three files, and return the receipt.

    Args:
      trained: the network.
      split: at least two images to check it on.
      folder: made if absent.

    Raises:
      UserError: if the folder cannot be written, an image cannot be read, or the file cannot be
        used.
    """
    import jax

    lowered = lower(trained)
    description = json.dumps(describe(trained, lowered), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECEIPT).unlink(missing_ok=True)  # what it told of is replaced now
        (folder / ARTEFACT).write_bytes(lowered.exported.serialize())
        (folder / DESCRIPTION).write_text(description, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written: {error}") from error
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
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    return receipt


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, check, and say how it went: 0, or 1 if the check does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m mmljax.inference.export",
        description="Write the network of a run as a file that needs jax and numpy alone, and "
        "check it in a process that has no more. Runs on CPU unless JAX_PLATFORMS is set.",
    )
    offline.add_run_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="images to check it on, files or folders; default: the run's own queries",
    )
    parser.add_argument("--count", type=int, default=64, help="of these; default 64")
    options = parser.parse_args(arguments)
    if options.count < 2:
        parser.error("--count must be at least 2")
    offline.require("flatbuffers")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    offline.quiet_libraries()
    from mmljax.inference.embedder import load_embedder

    trained = offline.in_even_batches(load_embedder(options.run, step=options.step))
    split = offline.chosen_images(trained, images=options.images, split=None)
    split = offline.rows_of(split, slice(options.count))
    if len(split.labels) < 2:
        raise UserError("--images: one image has no neighbours to compare; name two at least")
    receipt = export_run(trained, split, options.output)
    print(
        f"{options.output / ARTEFACT}: on {receipt['images']} images the embeddings differ by at "
        f"most {receipt['largest_difference']:.1e}, and {receipt['queries_with_equal_neighbors']} "
        f"have equal neighbours: parity {'holds' if receipt['holds'] else 'does NOT hold'}"
    )
    return 0 if receipt["holds"] else 1


if __name__ == "__main__":
    offline.run(main)
