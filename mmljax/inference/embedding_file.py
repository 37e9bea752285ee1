"""The files of embeddings that ``mmljax embed`` writes: their columns, and reading them.

=============  ========================  =======================================================
``id``         string                    the image's name
``label``      int32, or null            the item's number in its split, where known
``embedding``  fixed-size list, float32  a unit vector
=============  ========================  =======================================================
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mmljax.errors import UserError
from mmljax.inference.parquet_parts import metadata
from mmljax.text import one_line

FORMAT = "mmljax embeddings 1"


class Gallery(NamedTuple):
    """Embeddings to search, on disk, with the name and label of each."""

    vectors: Float[np.ndarray, "g d"]  # float32, mapped from a temporary file
    ids: Any  # pyarrow [g] string
    labels: Any  # pyarrow [g] int32 or null
    made_from: dict[str, Any]  # run, step, weights, sizes, ...


def embeddings_table(names: np.ndarray, labels: np.ndarray, vectors: np.ndarray) -> Any:
    """A ``pyarrow.Table`` of embeddings.

    Args:
      names: ``[n]`` str.
      labels: ``[n]`` int32; -1 is unknown.
      vectors: ``[n d]`` float32.
    """
    import pyarrow as pa

    size = vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    return pa.table(
        {
            "id": pa.array([str(name) for name in names], pa.string()),
            "label": pa.array(labels.astype(np.int32), pa.int32(), mask=labels < 0),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, size),
        }
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file of embeddings: run, step, sizes, ...; no embedding is read.

    Raises:
      UserError: if it is not a file of embeddings.
    """
    from pyarrow import parquet

    made_from = metadata(path)
    size, rows = (made_from.get(key) for key in ("embedding_size", "rows"))
    if made_from.get("format") == FORMAT and type(size) is int and size > 0 and type(rows) is int:
        nothing = np.zeros((0, size), np.float32)
        wanted = embeddings_table(np.zeros(0, str), np.zeros(0, np.int32), nothing).schema
        if parquet.read_schema(path).equals(wanted):
            return made_from
    raise UserError(f"{path} holds no embeddings; make such a file by mmljax embed")


def read_gallery(path: Path) -> Gallery:
    """The embeddings of a file, memory-mapped for repeated searches.

    They are unpacked once into a temporary file (in the folder that ``TMPDIR`` names), 4 bytes per
    number, so that memory holds only the part that is being searched.

    Raises:
      UserError: if it is not a file of embeddings or damaged, or the temporary file has no room.
    """
    from pyarrow import parquet

    made_from = read_metadata(path)
    size = made_from["embedding_size"]
    try:
        with parquet.ParquetFile(path) as file, tempfile.TemporaryFile() as raw:
            for group in range(file.num_row_groups):  # those of other writers may be large
                column = file.read_row_group(group, columns=["embedding"]).column(0)
                for chunk in column.chunks:
                    raw.write(np.asarray(chunk.flatten(), np.float32).tobytes())
            raw.flush()
            rows = file.metadata.num_rows
            vectors = np.memmap(raw, np.float32, mode="r", shape=(rows, size))
        table = parquet.read_table(path, columns=["id", "label"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read or unpacked ({one_line(error)}); make it "
            "again, or set TMPDIR to a folder on a disk with room for its embeddings"
        ) from error
    return Gallery(vectors, table["id"], table["label"], made_from)
