"""Small copies of embeddings: 8 bits or 1 bit per number, with a scale for each row.

Only the gallery is quantised: a search multiplies float32 queries with the decoded rows
(:func:`mmljax.retrieval.streaming.streamed_nearest_neighbors`). Each row has its own scale, so a
file can be written part by part, and every row has the length of its decoding error, with which
:mod:`mmljax.retrieval.rescoring` proves that no neighbour was missed.

- ``int8``: ``s v``, where ``s = max |x| / 127`` and ``v = round(x / s)``.
- ``binary``: ``s b``, where ``b`` is the sign of ``x`` and ``s`` the mean of ``|x|``, which is the
  scale of least error (Rastegari et al. 2016, arXiv 1603.05279, equation 6).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

from mmljax.errors import UserError

CODE_DTYPES = {"int8": np.dtype(np.int8), "binary": np.dtype(np.uint8)}
"""How the numbers of a row are kept; eight signs to a byte under ``binary``."""

_LARGEST = 127  # of int8; -128 is not used, so that codes are symmetric


@dataclasses.dataclass(frozen=True)
class Codes:
    """Quantised embeddings.

    Raises:
      UserError: if shapes or types do not fit, or a scale or an error is not finite and at least 0.
    """

    values: Int8[np.ndarray, "n d"] | UInt8[np.ndarray, "n b"]
    scale: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " n"]
    """At least the Euclidean distance of each row from its decoded row."""
    size: int
    """Numbers of a row, ``d``."""

    def __post_init__(self) -> None:
        width = self.size if self.values.dtype == np.int8 else -(-self.size // 8)
        rows = self.values.shape[:1]
        if self.values.shape[1:] != (width,) or not self.scale.shape == self.error.shape == rows:
            raise UserError(
                f"codes of {self.size} dimensions must have values [n {width}], scale [n] and "
                f"error [n], found {self.values.shape}, {self.scale.shape} and {self.error.shape}"
            )
        for name, numbers in (("scale", self.scale), ("error", self.error)):
            wrong = ~(np.isfinite(numbers) & (numbers >= 0))
            if wrong.any():
                row = int(np.argmax(wrong))
                raise UserError(
                    f"the {name} of {int(wrong.sum())} of {rows[0]} gallery rows is not a number "
                    f"of at least 0: the first is row {row}, {numbers[row]}; embed the images again"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and numbers of a row."""
        return len(self.values), self.size


def quantize(vectors: Float[np.ndarray, "n d"], *, dtype: str) -> Codes:
    """Codes of finite vectors, with a scale per row.

    >>> codes = quantize(np.array([[1.0, -0.5]], np.float32), dtype="int8")
    >>> codes.values.tolist(), round(127 * float(codes.scale[0]), 6)
    ([[127, -64]], 1.0)

    Args:
      vectors: the embeddings.
      dtype: ``int8`` or ``binary``.
    """
    x = np.asarray(vectors, np.float32)
    if dtype == "int8":
        scale = np.abs(x).max(axis=1, initial=0) / np.float32(_LARGEST)
        # The product may round beyond 127 by a subnormal scale.
        steps = np.rint(x / np.where(scale > 0, scale, 1)[:, None])
        values: np.ndarray = np.clip(steps, -_LARGEST, _LARGEST).astype(np.int8)
        decoded = values * scale[:, None].astype(np.float64)
    else:
        scale = np.abs(x).mean(axis=1, dtype=np.float64).astype(np.float32)
        values = np.packbits(x >= 0, axis=1)
        decoded = np.where(x >= 0, 1, -1) * scale[:, None].astype(np.float64)
    error = np.linalg.norm(x - decoded, axis=1)
    upwards = np.nextafter(error.astype(np.float32), np.float32(np.inf))
    return Codes(values, scale, upwards, x.shape[1])


def decode(
    values: Int8[Array, "n d"] | UInt8[Array, "n b"], scale: Float[Array, " n"], *, size: int
) -> Float[Array, "n d"]:
    """The vectors that codes stand for, float32.

    Args:
      values: of :class:`Codes`, like ``scale``.
      scale: of each row.
      size: numbers of a row.
    """
    if values.dtype == jnp.uint8:
        values = 2 * jnp.unpackbits(values, axis=1, count=size).astype(jnp.int8) - 1
    return values.astype(jnp.float32) * scale[:, None]
