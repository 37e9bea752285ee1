"""The words every other module speaks: dimension letters, arrays' names, protocols. No logic.

Dimension letters, used in every public signature:

======  =====================================================================
``b``   anchors: the rows of a batch that this device owns
``r``   references: the columns that the anchors look at (global batch, memory)
``c``   proxies that this device owns; ``p`` all proxies
``n``   rows of any similarity block, ``m`` its columns
``d``   embedding size
``k``   neighbours
``q``   queries, ``g`` gallery
``o``   objectives
======  =====================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Params = Any
"""A pytree of trainable arrays."""


class Batch(NamedTuple):
    """Images with their labels; what a pipeline yields and a step takes."""

    images: Array  # [b height width channels] uint8
    labels: Int[Array, " b"]
    valid: Bool[Array, " b"]  # False on the padding of the last evaluation batch


class PairMasks(NamedTuple):
    """Which columns of a similarity block are positives and negatives of each row.

    A column in neither mask (the anchor itself, padding, an unmined pair) plays no part.
    """

    positive: Bool[Array, "n m"]
    negative: Bool[Array, "n m"]


class Split(NamedTuple):
    """One split of a data set, before decoding. NumPy, on the host."""

    images: Any  # numpy: [n] str paths, [n] bytes (object), or [n height width channels] uint8
    labels: Any  # numpy [n] int32
    names: Any  # numpy [n] str: each image's name in errors and records


class Dataset(NamedTuple):
    """Train, query and gallery; train classes are 0 .. classes - 1, test classes others' own.

    Query and gallery share one numbering of labels. ``gallery`` is None for self-retrieval.
    """

    train: Split
    query: Split
    gallery: Split | None
    classes: int  # of the training split


class Points(NamedTuple):
    """One side of a similarity block: samples or proxies, as rows or as columns."""

    vectors: Float[Array, "n d"]  # unit length
    labels: Int[Array, " n"]
    positions: Int[Array, " n"]  # global; a row and a column of one kind and position are one
    valid: Bool[Array, " n"]  # False for padding and empty memory


class Views(NamedTuple):
    """What a miner looks at: two similarities of anchors and candidates, and a key."""

    sample: Float[Array, "b r"]  # anchor and candidate
    proxy: Float[Array, "b r"]  # the anchor's class proxy and candidate
    anchor: Float[Array, " b"]  # the anchor's class proxy and the anchor
    keys: PRNGKeyArray  # [b]: one per anchor, for miners that sample


class Values(NamedTuple):
    """Values of an objective per row, and which rows enter its mean.

    An objective of several terms, each with a mean of its own, stacks them in a leading axis.
    """

    value: Float[Array, "*terms n"]
    valid: Bool[Array, "*terms n"]


class Loss(Protocol):
    """An objective on a block of similarities. Pure; knows nothing of devices or batches."""

    def __call__(
        self, similarity: Float[Array, "n m"], masks: PairMasks, **hyperparameters: Any
    ) -> Values:
        """Values per row, and which rows enter their mean."""


class Miner(Protocol):
    """Masks in, smaller masks out; the views are stopped from carrying a gradient."""

    def __call__(self, views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
        """The pairs that are kept."""


class Objective(NamedTuple):
    """An objective as a run uses it: hyperparameters bound, ready to be called."""

    name: str
    relation: str  # a key of relations.RELATIONS
    loss: Any  # (similarity, masks) -> Values
    miner: Any  # (views, masks) -> PairMasks, or None to keep every pair
    memory: bool  # whether the cross-batch memory joins its columns
    sampled_proxies: int = 0  # how many proxies are drawn as its columns at a step; 0: all are


class Combination(NamedTuple):
    """How the losses are weighted: a pair of pure functions in the manner of optax.

    ``init(objectives) -> (params, state)`` with the number of objectives;
    ``apply(params, state, losses, gradient_norms) -> (weights, params_gradient, state)`` with
    ``losses [o]``, ``gradient_norms [2 o]`` (row 0 at the embeddings, row 1 at the proxies),
    ``weights [o]``. ``params_gradient`` goes to the optimiser of the contribution weights;
    ``state`` is what no optimiser trains (first losses, a random key).
    """

    init: Any
    apply: Any


class TrainState(NamedTuple):
    """Everything that a run needs to go on: what a checkpoint holds.

    ``params`` has the keys ``network``, ``proxies`` (``[p d]``, sharded by rows) and ``weights``.
    """

    step: Int[Array, ""]
    params: dict[str, Params]
    model_state: Params  # BatchNorm statistics
    combination_state: Params
    optimizer_state: Params
    memory: Params  # cross-batch memory, or ()
    key: PRNGKeyArray
