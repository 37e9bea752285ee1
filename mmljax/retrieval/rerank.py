"""Second stages that change embeddings: query expansion and database augmentation.

Both average a vector with its nearest rows of the gallery, weighted by their similarities, and
scale the result to unit length; the search that follows is any exact one. See also
:mod:`mmljax.retrieval.k_reciprocal`, which reorders neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmljax.mesh import make_mesh
from mmljax.numerics import l2_normalize
from mmljax.retrieval.checks import AnyArray
from mmljax.retrieval.search import CHUNK, QUERY_BLOCK, sharded_nearest_neighbors
from mmljax.retrieval.top_k import Neighbors, in_blocks


def query_expansion(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    *,
    k: int,
    alpha: float,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    self_index: Int[AnyArray, " q"] | None = None,
) -> Float[Array, "q d"]:
    """Queries averaged with their ``k`` nearest gallery rows, of unit length.

    ``q + sum_i max(q.x_i, 0)^alpha x_i`` before it is scaled. Alpha query expansion:
    Radenovic, Tolias, Chum (2018), arXiv 1711.02512; ``alpha`` 0 is average query expansion (Chum
    et al. 2007). Deviation: a negative similarity counts as 0.

    >>> x = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    >>> found = query_expansion(x[:1], x[1:], k=1, alpha=1.0)  # (1, 0) + 0.8 (0.8, 0.6)
    >>> [round(value, 3) for value in found[0].tolist()]
    [0.96, 0.281]

    Args:
      queries: embeddings of unit length.
      gallery: the same.
      k: rows that are averaged with each query.
      alpha: exponent of the weights; the higher, the less the farther rows count.
      chunk: bounds the similarities held at once, as in
        :func:`mmljax.retrieval.search.nearest_neighbors`.
      mesh: the devices that share the gallery; all by default.
      self_index: each query's own row of the gallery, which is not averaged with it once more.

    Returns:
      Unit vectors, to be searched for in the same gallery.

    Raises:
      UserError: as :func:`mmljax.retrieval.search.nearest_neighbors`.
    """
    found = sharded_nearest_neighbors(
        queries,
        gallery,
        k=k,
        chunk=chunk,
        mesh=make_mesh() if mesh is None else mesh,
        self_index=self_index,
    )
    return _averaged(queries, gallery, found, alpha)


def database_augmentation(
    gallery: Float[AnyArray, "g d"],
    *,
    k: int,
    alpha: float,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
) -> Float[Array, "g d"]:
    """Gallery rows averaged with their ``k`` nearest others, as queries in :func:`query_expansion`.

    Database augmentation: Arandjelovic and Zisserman (2012), Three things everyone should know to
    improve object retrieval, who add the neighbours with equal weights (``alpha`` 0).
    Deviation: Gordo et al. (2017), arXiv 1610.07940, weigh them by rank, this function by
    similarity.

    >>> x = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    >>> found = database_augmentation(x, k=1, alpha=0.0)  # first row: (1, 0) + (0.8, 0.6)
    >>> [round(value, 3) for value in found[0].tolist()]
    [0.949, 0.316]

    Args:
      gallery: embeddings of unit length.
      k: other rows that are averaged with each.
      alpha: exponent of the weights.
      chunk: as in :func:`query_expansion`.
      mesh: as in :func:`query_expansion`.

    Returns:
      Unit vectors, to be searched in place of the gallery.

    Raises:
      UserError: as :func:`mmljax.retrieval.search.nearest_neighbors`.
    """
    own = np.arange(len(gallery), dtype=np.int32)
    return query_expansion(
        gallery, gallery, k=k, alpha=alpha, chunk=chunk, mesh=mesh, self_index=own
    )


@jax.jit
def _averaged(
    vectors: Array, gallery: Array, found: Neighbors, alpha: float
) -> Float[Array, "n d"]:
    gallery = gallery.astype(jnp.float32)

    def average(x: Array, similarity: Array, indices: Array) -> tuple[Array]:
        weight = jnp.maximum(similarity, 0) ** alpha  # 0 ** 0 is 1
        rows = jnp.einsum("nk,nkd->nd", weight, gallery[indices], precision="highest")
        return (l2_normalize(x + rows),)

    return in_blocks(average, (vectors.astype(jnp.float32), *found), block=QUERY_BLOCK)[0]
