"""A trained network as a folder in the layout of the Hugging Face hub, apart from its run.

=============================  ====================================================================
``model.safetensors``          weights and BatchNorm statistics by name; adapters are merged
``config.json``                the network's part of the config, and the hash of the weights
``preprocessor_config.json``   how images become crops, in the words of transformers
``results.json``               scores, protocol and the config of the training, if the run ended
``README.md``                  the model card (:mod:`mmljax.inference.model_card`)
=============================  ====================================================================

Nothing in it is a program or a pickle. What a later version adds to the config has its default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mmljax.config import Config, default_config, from_mapping, to_dict
from mmljax.errors import UserError, require
from mmljax.files import replacing, write_atomically
from mmljax.inference import model_card
from mmljax.models.embedder import PIXEL_NORMS, choose_pixel_norm
from mmljax.models.weight_files import hub_address
from mmljax.runs.remote import fetched
from mmljax.runs.writer import read_results
from mmljax.text import as_json, one_line

if TYPE_CHECKING:
    from mmljax.inference.embedder import TrainedEmbedder

WEIGHTS, CONFIG, RESULTS, CARD = "model.safetensors", "config.json", "results.json", "README.md"
FILES = (WEIGHTS, model_card.IMAGES, RESULTS, CARD, CONFIG)  # the last one makes the folder whole
FORMAT = "mmljax embedder 1"
SOURCE = "hub"
"""``config.data.source`` of a network that has no data set."""

_CROP_KEYS = ("image_size", "resize_size", "resampling", "eval_batch_size")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_EXTRA = "pretrained"


class Published(NamedTuple):
    """What a folder holds."""

    config: Config  # of the network and its crops; all else is the default
    identity: dict[str, Any]
    channels: int
    weights: Mapping[str, np.ndarray]


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder, and not a run."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def fetch(address: str) -> Path:
    """The folder of ``hf:OWNER/NAME@COMMIT``, which is downloaded once into the hub's cache.

    Raises:
      UserError: if the address has no commit, or the hub or the folder cannot be reached.
    """
    require("huggingface_hub", extra=_EXTRA, purpose=address)
    repository, commit = hub_address(address, flag=address)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, revision=commit, allow_patterns=list(FILES))
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise UserError(
            f"{address} cannot be downloaded: {one_line(error)}; without a network, give the path "
            "of a folder"
        ) from error
    return Path(found)


def located(run: Path | str) -> Path:
    """The folder of a run or of an export, of which an address is fetched.

    Raises:
      UserError: as :func:`fetch` and :func:`mmljax.runs.remote.fetched`.
    """
    return fetch(run) if isinstance(run, str) and run.startswith("hf:") else fetched(run)


def read_folder(folder: Path) -> Published:
    """Read a folder; nothing in it is run.

    Raises:
      UserError: if a file is missing or damaged, or of a later version.
    """
    require("safetensors", extra=_EXTRA, purpose=str(folder / WEIGHTS))
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        contents = (folder / WEIGHTS).read_bytes()
        if stored["format"] != FORMAT:
            raise UserError(
                f"{folder / CONFIG} has the format {stored['format']!r}, and this version reads "
                f"{FORMAT!r}; install the version of mmljax that its {CARD} names"
            )
        found = hashlib.sha256(contents).hexdigest()
        if found != stored["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS} has SHA-256 {found}, and {CONFIG} says {stored['sha256']}; "
                "fetch the folder again"
            )
        mapping = default_config().to_dict()
        mapping["model"] |= stored["model"]
        mapping["data"] |= {**stored["data"], "source": SOURCE}
        identity, channels = dict(stored["identity"]), int(stored["channels"])
        return Published(from_mapping(mapping), identity, channels, load(contents))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no complete export of a network ({one_line(error)}); export it again by "
            "mmljax export RUN --format hub"
        ) from error


def arrays_by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a nested mapping by their path with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def filled(target: Any, published: Published, *, folder: Path) -> Any:
    """A tree like ``target``, of shapes, with the arrays of a folder.

    Raises:
      UserError: if the folder does not hold exactly these arrays.
    """
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in arrays_by_name(target).items()}
    found = {name: (array.shape, array.dtype) for name, array in published.weights.items()}
    wrong = sorted(
        name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)
    )
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} does not fit its {CONFIG}: {wrong[0]} is {found.get(wrong[0])}, "
            f"not {shapes.get(wrong[0])}; fetch the folder again"
        )
    names = iter(shapes)
    return jax.tree.map(lambda _: published.weights[next(names)], target)


def write_folder(
    trained: TrainedEmbedder, folder: Path, *, run: Path, license_id: str
) -> dict[str, int]:
    """Write the files, ``config.json`` last, and return their sizes; see ``files.replacing``.

    Args:
      trained: the network.
      folder: made if absent.
      run: its directory, for scores and ledger.
      license_id: one of the hub's, such as ``apache-2.0``; ``unknown`` where it is not stated.

    Raises:
      UserError: if the folder cannot be written, is a run's, or is being written by another.
    """
    require("safetensors", extra=_EXTRA, purpose="mmljax export --format hub")
    if (folder / CONFIG).exists() and not (folder / WEIGHTS).exists():
        raise UserError(f"--output={folder} has a {CONFIG} of something else; name another folder")
    with replacing(folder, FILES, flag="--output") as partial:
        _write(trained, partial, run=run, license_id=license_id)
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}


def _write(trained: TrainedEmbedder, folder: Path, *, run: Path, license_id: str) -> None:
    from safetensors.numpy import save

    tree = {"network": trained.network, "model_state": trained.model_state}
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays_by_name(tree).items()}
    contents = save(arrays, metadata={"format": FORMAT})
    write_atomically(folder / WEIGHTS, contents)
    config = to_dict(trained.config)
    stored = {
        "library_name": "mmljax",
        "format": FORMAT,
        "channels": trained.channels,
        "identity": trained.identity,
        "model": config["model"] | {"pretrained": ""},  # its weights are in the file
        "data": {key: config["data"][key] for key in _CROP_KEYS},
        "sha256": hashlib.sha256(contents).hexdigest(),
    }
    stored["model"]["pixel_norm"] = _pixel_norm(trained.config)
    write_atomically(folder / CONFIG, as_json(stored))
    write_atomically(folder / model_card.IMAGES, as_json(_preprocessor(trained)))
    results = _results(run)
    if results is not None:
        write_atomically(folder / RESULTS, as_json(results))
    card = model_card.model_card(
        trained, results=results, ledger=model_card.last_ledger(run), license_id=license_id
    )
    write_atomically(folder / CARD, card)


def _pixel_norm(config: Config) -> str:
    model = config.model
    return choose_pixel_norm(model.pixel_norm, pretrained=model.pretrained, backbone=model.backbone)


def _preprocessor(trained: TrainedEmbedder) -> dict[str, Any]:
    """The crop and the norm of pixels as transformers names them."""
    data = trained.config.data
    norm: tuple[tuple[float, ...], ...] = PIXEL_NORMS[_pixel_norm(trained.config)]
    if trained.channels != 3:  # as normalize_pixels
        norm = ((0.5,) * trained.channels,) * 2
    mean, deviation = norm
    return {
        "do_resize": True,
        "size": {"shortest_edge": data.resize_size},
        "resample": _RESAMPLE[data.resampling],
        "do_center_crop": True,
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(deviation),
    }


def _results(run: Path) -> dict[str, Any] | None:
    """The run's results without paths of its machine."""
    results = read_results(run)
    if results is None:
        return None
    results.pop("sessions", None)
    config = results.get("config", {})
    config.get("data", {}).update(directory="")
    config.get("evaluation", {}).update(distractors="")
    return results


def upload(folder: Path, repository: str, *, sizes: Mapping[str, int], private: bool) -> str:
    """Upload the files of a folder as one commit; return the address that ``fetch`` takes.

    Args:
      folder: as ``write_folder`` wrote it.
      repository: ``OWNER/NAME``; made if absent.
      sizes: of the files that are uploaded.
      private: whether a repository that is made here is private.

    Raises:
      UserError: if the hub refuses it or cannot be reached.
    """
    require("huggingface_hub", extra=_EXTRA, purpose=f"--upload={repository}")
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=list(sizes)
        )
    except Exception as error:  # those of the HTTP library, which differs by version, too
        raise UserError(
            f"--upload={repository}: {one_line(error)}; log in by hf auth login, and check the name"
        ) from error
    return f"hf:{repository}@{commit.oid}"
