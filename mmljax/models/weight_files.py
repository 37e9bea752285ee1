"""Arrays by name from files of weights: ``.safetensors``, and what ``torch.save`` writes.

No code of a file runs. A file of torch's holds a pickle, a program that may call any function; the
reader here knows the few names that a dict of tensors needs, refuses any other, and takes the
numbers from the bytes beside it. Torch itself is not needed and not used.
"""

from __future__ import annotations

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

from mmljax.errors import UserError

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


def locate(source: str) -> Path:
    """The local file that ``config.model.pretrained`` means.

    Args:
      source: a path, or ``hf:OWNER/NAME@COMMIT`` for the weights of a Hugging Face repository at a
        commit (40 hexadecimal digits), which are downloaded once and kept in its usual cache.

    Raises:
      UserError: if there is no such file, the commit is missing, or the hub cannot be reached.
    """
    if not source.startswith("hf:"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(
                f"{_KEY}={source!r} is no file; give a .safetensors or .pth file, or "
                "hf:OWNER/NAME@COMMIT"
            )
        return path
    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(
            f"{_KEY}={source!r} must be hf:OWNER/NAME@COMMIT with the 40 hexadecimal digits of a "
            "commit, so that the weights stay the same ones"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError(f"{_KEY}={source!r} needs pip install 'mmljax[pretrained]'") from error
    errors: list[Exception] = []
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(match[1], name, revision=match[2]))
        except (EntryNotFoundError, OSError, ValueError) as error:
            errors.append(error)
            if not isinstance(error, EntryNotFoundError):
                break
    raise UserError(
        f"{_KEY}={source!r} cannot be had: {_one_line(errors[0])} Without a network, give the path "
        "of a file"
    ) from errors[0]


def read_weights(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a file of weights, by name.

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
            f"{_KEY}: {path} cannot be read as weights: {_one_line(error)}; "
            "give a .safetensors file, or a state dict saved by torch.save"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{_KEY}: {path} needs pip install 'mmljax[pretrained]'") from error
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


# Nothing that a pickle can name has attributes that the pickle could set.


class _Dict(dict):
    """In place of ``OrderedDict``; the attributes that a state dict carries are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Rebuild:
    """In place of torch's functions: the description of a tensor, not yet its numbers."""

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
    """The next pickle of a stream, and the storages that it names."""
    start, limit = stream.tell(), len(stream.getbuffer())
    for opcode, argument, _ in pickletools.genops(stream):
        # The unpickler makes room up to the place that is named, however far that is.
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
        raise ValueError(f"it holds a {type(saved).__name__} in place of a dict of tensors")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"its entry {name!r} is no tensor")
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in saved.items()}


def _array(tensor: _Tensor, raw: bytes | memoryview) -> np.ndarray:
    dtype, shape = tensor.storage.dtype, tensor.shape
    numbers = np.frombuffer(raw, dtype)
    if numbers.size != tensor.storage.length:
        raise ValueError(f"it has {numbers.size} numbers for {tensor.storage.length}")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True))
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    if last >= numbers.size or math.prod(shape) > numbers.size:
        raise ValueError("a tensor reaches beyond its storage")
    strides = [s * dtype.itemsize for s in tensor.strides]
    start = numbers[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, shape, strides, writeable=False)


def _read_zip(path: Path) -> tuple[Any, Mapping[str, bytes]]:
    """What was saved and the bytes of its storages: a zip archive (torch 1.6 and later)."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members.values()) > path.stat().st_size:
            raise ValueError("its members claim more bytes than it has")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > _PICKLE_BYTES:
            raise ValueError("it is no archive of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        saved, storages = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return saved, {key: archive.read(f"{folder}data/{key}") for key in storages}


def _read_old(path: Path) -> tuple[Any, Mapping[str, memoryview]]:
    """The same from five pickles and a row of storages, each a count and its bytes."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_PICKLE_BYTES))
        if _unpickle(head)[0] != _MAGIC:
            raise ValueError("it is not of torch.save")
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
