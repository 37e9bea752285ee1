"""The files of embeddings that ``mmljax embed`` writes: their columns, and reading them.

=============  ========================  =======================================================
``id``         string                    the image's name
``label``      int32, or null            the item's number in its split, where known
``embedding``  fixed-size list, float32  a unit vector
=============  ========================  =======================================================

A file of ``--dtype int8`` or ``binary`` has small copies beside them, which a search reads in their
place (:mod:`mmljax.retrieval.quantization`):

=============  =========================================  ======================================
``code``       fixed-size list, int8 (or uint8, 8 signs)  the small copy of the unit vector
``scale``      float32                                    what the code is multiplied with
``error``      float32                                    distance of the vector from its copy
=============  =========================================  ======================================
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mmljax.errors import UserError
from mmljax.inference.parquet_parts import metadata
from mmljax.retrieval.quantization import CODE_DTYPES, Codes, quantize
from mmljax.text import one_line

FORMAT = "mmljax embeddings 1"

FLOAT32 = "float32"
DTYPES = (FLOAT32, *CODE_DTYPES)
"""Of the vectors that a search of the file reads."""


class Gallery(NamedTuple):
    """Embeddings to search, on disk, with the name and label of each."""

    vectors: Float[np.ndarray, "g d"] | None  # float32, mapped; None if only codes are read
    codes: Codes | None  # mapped; None in a file of float32 alone
    ids: Any  # pyarrow [g] string
    labels: Any  # pyarrow [g] int32 or null
    made_from: dict[str, Any]  # run, step, weights, sizes, ...


def embeddings_table(
    names: np.ndarray, labels: np.ndarray, vectors: np.ndarray, *, dtype: str = FLOAT32
) -> Any:
    """A ``pyarrow.Table`` of embeddings.

    Args:
      names: ``[n]`` str.
      labels: ``[n]`` int32; -1 is unknown.
      vectors: ``[n d]`` float32.
      dtype: of ``DTYPES``; other than float32 adds the columns of codes.
    """
    import pyarrow as pa

    def lists(rows: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])

    columns = {
        "id": pa.array([str(name) for name in names], pa.string()),
        "label": pa.array(labels.astype(np.int32), pa.int32(), mask=labels < 0),
        "embedding": lists(np.asarray(vectors, np.float32)),
    }
    if dtype != FLOAT32:
        codes = quantize(vectors, dtype=dtype)
        columns["code"] = lists(codes.values)
        columns |= {"scale": pa.array(codes.scale), "error": pa.array(codes.error)}
    return pa.table(columns)


def dtype_of(made_from: dict[str, Any]) -> str:
    """What of ``DTYPES`` a file is, by its metadata; files before codes existed do not say it."""
    return made_from.get("dtype", FLOAT32)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file of embeddings: run, step, sizes, ...; no embedding is read.

    Raises:
      UserError: if it is not a file of embeddings.
    """
    from pyarrow import parquet

    made_from = metadata(path)
    size, rows = (made_from.get(key) for key in ("embedding_size", "rows"))
    dtype, known = dtype_of(made_from), made_from.get("format") == FORMAT
    if known and type(size) is int and size > 0 and type(rows) is int and dtype in DTYPES:
        nothing = np.zeros((0, size), np.float32)
        empty = embeddings_table(np.zeros(0, str), np.zeros(0, np.int32), nothing, dtype=dtype)
        wanted = empty.schema
        if parquet.read_schema(path).equals(wanted):
            return made_from
    raise UserError(f"{path} holds no embeddings; make such a file by mmljax embed")


def read_gallery(path: Path, *, exact: bool = False) -> Gallery:
    """The embeddings of a file, memory-mapped for repeated searches.

    They are unpacked once into temporary files (in the folder that ``TMPDIR`` names), so that
    memory holds only the part that is being searched.

    Args:
      path: the file.
      exact: whether to unpack float32 vectors also where there are codes.

    Raises:
      UserError: if it is not a file of embeddings or damaged, or a temporary file has no room.
    """
    from pyarrow import parquet

    made_from = read_metadata(path)
    small = dtype_of(made_from) != FLOAT32
    try:
        with parquet.ParquetFile(path) as file:
            vectors = _unpacked(file, "embedding") if exact or not small else None
            values = _unpacked(file, "code") if small else None
        names = ["id", "label", *(["scale", "error"] if small else [])]
        table = parquet.read_table(path, columns=names)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read or unpacked ({one_line(error)}); make it "
            "again, or set TMPDIR to a folder on a disk with room for its embeddings"
        ) from error
    codes = None
    if values is not None:
        scale, distance = (table[name].to_numpy() for name in ("scale", "error"))
        codes = Codes(values, scale, distance, made_from["embedding_size"])
    return Gallery(vectors, codes, table["id"], table["label"], made_from)


def _unpacked(file: Any, name: str) -> np.ndarray:
    """A column of lists, ``[n d]``, mapped from a temporary file."""
    kind = file.schema_arrow.field(name).type
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    with tempfile.TemporaryFile() as raw:
        for group in range(file.num_row_groups):  # those of other writers may be large
            for chunk in file.read_row_group(group, columns=[name]).column(0).chunks:
                raw.write(np.asarray(chunk.flatten(), dtype).tobytes())
        raw.flush()
        shape = file.metadata.num_rows, kind.list_size
        return np.memmap(raw, dtype, mode="r", shape=shape)
