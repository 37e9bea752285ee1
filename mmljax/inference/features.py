"""Features of a whole data set, written once so that heads can be trained on them in seconds.

The files are described in :mod:`mmljax.data.readers.features`. Each is written from its start to
its end, and ``progress.json`` says how much of it is on the disk, so a command that was killed
resumes there and makes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mmljax.config import Config, choose
from mmljax.data import load
from mmljax.data.decoding import DECODING
from mmljax.data.fingerprint import dataset_fingerprint
from mmljax.data.readers.features import (
    DISTRACTORS,
    FORMAT,
    IDENTITY,
    IMAGES,
    PROGRESS,
    network_input,
    random_crops,
)
from mmljax.data.readers.splits import TRAIN, Part, make_dataset
from mmljax.errors import UserError
from mmljax.files import Locked, acquire_lock, write_atomically, written_atomically
from mmljax.inference.embed import progress_bar, rows_of
from mmljax.inference.embedder import weights_digest
from mmljax.mesh import make_mesh, replicated
from mmljax.models.embedder import Embedder
from mmljax.models.lora import refuse_on_features
from mmljax.text import differences, one_line
from mmljax.training.state import make_model
from mmljax.types import Dataset, Split

DTYPES = {"float32": np.float32, "float16": np.float16}

_LOCK = "lock"


def write_features(
    config: Config,
    output: Path,
    *,
    views: int,
    dtype: str = "float32",
    rows_per_part: int = 8192,
    skip_corrupt: bool = False,
) -> dict[str, Any] | None:
    """Write the pooled features of a config's data set, or resume writing them.

    Args:
      config: its data, its backbone with the weights, and its pooling.
      output: the folder.
      views: random crops of each training image, beside its evaluation crop.
      dtype: of the features on the disk, a key of ``DTYPES``.
      rows_per_part: images between two saves.
      skip_corrupt: whether to leave out images that cannot be decoded.

    Returns:
      What is in ``features.json``; None if it was complete before.

    Raises:
      UserError: if the folder has other features, is being written by another process or cannot be
        written, or an image, or the weights, cannot be used, or the backbone would have adapters.
    """
    choose(DTYPES, dtype, key="dtype")
    if config.data.source == load.FEATURES:
        raise UserError("--config.data.source=features: these are features; name images")
    refuse_on_features(config.model.lora)
    dataset = _whole_images(load.load_dataset(config), config, skip=skip_corrupt)
    model = _model(config, channels=load.image_channels(dataset))
    splits = {name: split for name, split in dataset._asdict().items() if isinstance(split, Split)}
    identity = {
        "format": FORMAT,
        **network_input(config),
        "random_crops": random_crops(config) if views else {},
        "weights": weights_digest(nnx.to_pure_dict(nnx.state(model.backbone))),
        "seed": config.seed,
        "channels": load.image_channels(dataset),
        "features": model.backbone.features,
        "dtype": dtype,
        "views": {name: 1 + views * (name == TRAIN) for name in splits},
        "classes": dataset.classes,
        "batch": config.data.eval_batch_size,
        "images": dataset_fingerprint(dataset),
        **({DISTRACTORS: config.evaluation.distractors} if dataset.distractors else {}),
        "decoding": "none" if dataset.train.images.ndim > 1 else DECODING,
    }
    with _Folder(output, identity) as folder:
        if folder.finished:
            return None
        folder.write_images(splits)
        for name, split in splits.items():
            _write_split(folder, name, split, config, model, rows_per_part=rows_per_part)
        folder.finish()
    return identity


def _whole_images(dataset: Dataset, config: Config, *, skip: bool) -> Dataset:
    """The data set without the images that cannot be decoded, if these are to be skipped."""
    if not skip or dataset.train.images.ndim == 4:
        return dataset
    from mmljax.data.pipeline import decodable  # needs TensorFlow

    kept = {
        name: rows_of(split, decodable(split, config.data))
        for name, split in dataset._asdict().items()
        if isinstance(split, Split)
    }
    distractors = kept.pop(DISTRACTORS, None)
    whole = make_dataset(*(Part(*split) for split in kept.values()))
    return whole._replace(distractors=distractors)


def _model(config: Config, *, channels: int) -> Embedder:
    graphdef, *state = make_model(
        config.model, seed=config.seed, channels=channels, pretrained=True
    )
    mesh = make_mesh()
    return nnx.merge(graphdef, *(jax.device_put(x, replicated(mesh)) for x in state))


def _write_split(
    folder: _Folder, name: str, split: Split, config: Config, model: Embedder, *, rows_per_part: int
) -> None:
    """Append the features of a split that are not in its file yet, view by view."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def pooled(state: Any, images: UInt8[Array, "b s s ch"]) -> Float[Array, "b f"]:
        return nnx.merge(graphdef, state).pooled(images)

    mesh, size, count = make_mesh(), config.data.eval_batch_size, len(split.labels)
    part = max(1, rows_per_part // size)  # batches
    with progress_bar(range(count * folder.views(name))) as bar:
        bar.update(folder.done(name))
        for view in range(folder.views(name)):
            for first in range(0, -(-count // size), part):
                start, stop = first * size, min((first + part) * size, count)
                if view * count + start < folder.done(name):
                    continue
                steps = range(first, -(-stop // size))
                batches = load.ordered_batches(split, config, mesh, view=view, steps=steps)
                found = [np.asarray(pooled(state, batch.images)) for batch in batches]
                folder.append(name, _checked(np.concatenate(found)[: stop - start], split, start))
                bar.update(stop - start)


def _checked(rows: np.ndarray, split: Split, start: int) -> np.ndarray:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        name = split.names[start + int(np.argmax(bad))]
        raise UserError(f"the features of image {name} are not finite; use other weights")
    return rows


class _Folder:
    """The folder of features while it is written; as a context manager, it is locked."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, dict(identity)
        self._lock: IO[str] | None = None
        self._done: dict[str, int] = dict.fromkeys(identity["views"], 0)
        self.finished = False

    def __enter__(self) -> _Folder:
        with self._writing():
            self._path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = acquire_lock(self._path / _LOCK)
            except Locked as holder:
                raise UserError(
                    f"--output={self._path} is being written by {holder}; wait for it to end, or "
                    "name another --output"
                ) from None
        try:
            self._start()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _start(self) -> None:
        """Compare the folder with the identity, and find out what it has."""
        self.finished = (self._path / IDENTITY).exists()
        progress = self._path / PROGRESS
        if not self.finished and not progress.exists():
            return
        found = _read_json(self._path / IDENTITY if self.finished else progress)
        if not self.finished:
            self._done = found.get("done", self._done)
            found = found.get("identity", {})
        changed = differences({key: found.get(key) for key in self._identity}, self._identity)
        if changed:
            raise UserError(
                f"--output={self._path} has features made from something else "
                f"({'; '.join(changed)}); name another --output, or remove it"
            )

    def views(self, name: str) -> int:
        """Views of a split."""
        return self._identity["views"][name]

    def done(self, name: str) -> int:
        """Rows of a split's file that are on the disk, of all views in their order."""
        return self._done[name]

    def write_images(self, splits: Mapping[str, Split]) -> None:
        """Write labels and names, and start each file that is not there."""
        arrays: dict[str, Any] = {}
        for name, split in splits.items():
            arrays |= {f"{name} labels": split.labels, f"{name} names": np.asarray(split.names)}
        with self._writing():
            with written_atomically(self._path / IMAGES) as partial, partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
            for name, split in splits.items():
                if not self._done[name]:
                    shape = (self.views(name), len(split.labels), self._identity["features"])
                    with (self._path / f"{name}.npy").open("wb") as file:
                        np.lib.format.write_array_header_1_0(
                            file,
                            {
                                "descr": np.dtype(self._identity["dtype"]).str,
                                "fortran_order": False,
                                "shape": shape,
                            },
                        )

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to a split's file, and then say so in ``progress.json``."""
        dtype = np.dtype(self._identity["dtype"])
        with self._writing(), (self._path / f"{name}.npy").open("rb+") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(self._done[name] * rows.shape[1] * dtype.itemsize, os.SEEK_CUR)
            file.write(np.ascontiguousarray(rows, dtype).tobytes())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            self._done[name] += len(rows)
            state = {"done": self._done, "identity": self._identity}
            write_atomically(self._path / PROGRESS, json.dumps(state))

    def finish(self) -> None:
        """Declare the folder complete."""
        with self._writing():
            write_atomically(self._path / IDENTITY, json.dumps(self._identity, indent=2))
            (self._path / PROGRESS).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--output={self._path} cannot be written ({one_line(error)}); free disk space, or "
                "name another --output; what is complete is kept"
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty, and so equal to no other, if the file is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
