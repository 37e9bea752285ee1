"""Array containers and protocols that every other module uses, almost without logic.

Dimension letters, used in every public signature:

======  =====================================================================
``b``   anchors: the rows of a batch that this device owns
``r``   references: the columns that the anchors are compared with (global batch, memory)
``c``   proxies that this device owns; ``p`` all proxies
``n``   rows of any similarity block, ``m`` its columns
``d``   embedding size
``k``   neighbours
``q``   queries, ``g`` gallery
``o``   objectives
======  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Params = Any
"""A pytree of trainable arrays."""


class Batch(NamedTuple):
    """Images with their labels, as a pipeline yields them and a step takes them.

    Rows that are not valid are padding. No objective and no score counts them; BatchNorm does, so a
    training batch should have none (the samplers never pad one).
    """

    images: Array  # [b height width channels] uint8
    labels: Int[Array, " b"]
    valid: Bool[Array, " b"]


class PairMasks(NamedTuple):
    """Which columns of a similarity block are positives and negatives of each row.

    A column in neither mask (the anchor itself, padding, a pair that mining dropped) has no effect.
    """

    positive: Bool[Array, "n m"]
    negative: Bool[Array, "n m"]


class Split(NamedTuple):
    """One split of a data set, before decoding. NumPy, on the host."""

    images: Any  # numpy: [n] str paths, [n] bytes (object), or [n height width channels] uint8
    labels: Any  # numpy [n] int32
    names: Any  # numpy [n] str: each image's name in errors and records


class Dataset(NamedTuple):
    """Train, query and gallery splits.

    Training classes are 0 .. classes - 1. Query and gallery share another numbering of their
    labels. ``gallery`` is None for self-retrieval. ``distractors`` match no query.
    """

    train: Split
    query: Split
    gallery: Split | None
    classes: int  # of the training split
    distractors: Split | None = None  # labels have no meaning

    @property
    def class_sizes(self) -> Any:
        """Training images of each class, as numpy ``[classes]``."""
        return np.bincount(self.train.labels, minlength=self.classes)


class Points(NamedTuple):
    """One side of a similarity block: samples or proxies, as rows or as columns."""

    vectors: Float[Array, "n d"]  # unit length
    labels: Int[Array, " n"]
    positions: Int[Array, " n"]  # global; a row and a column of equal kind and position are one
    valid: Bool[Array, " n"]  # False for padding and for empty memory slots


class Views(NamedTuple):
    """The input of a miner: two similarities of anchors and candidates, and a key per anchor."""

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
    """A loss on a block of similarities, its hyperparameters bound. Pure."""

    def __call__(
        self, similarity: Float[Array, "n m"], masks: PairMasks, /, *distances: Array, **margin: Any
    ) -> Values:
        """Values per row, and which rows enter their mean.

        ``distances`` are squared distances ``[n m]`` for a loss that takes them, see
        :func:`mmljax.losses.blocks.distances_for`. ``margin`` takes the place of the bound one
        where a :class:`Margin` says so.
        """


class Miner(Protocol):
    """A rule that selects pairs, its hyperparameters bound. Masks carry no gradient."""

    def __call__(self, views: Views, masks: PairMasks, /) -> PairMasks:
        """The pairs that are kept: subsets of the given masks."""


class Margin(NamedTuple):
    """The margin of a softmax loss that differs between classes, or rises over the first steps."""

    value: Any  # a number, or numpy [classes] of the training split
    rise: int = 0  # steps from 0 to its value; 0: in full from the start
    schedule: str = "linear"  # of the rise, a key of losses.margins.SCHEDULES


class BoundObjective(NamedTuple):
    """An objective with its loss and miner bound to their hyperparameters."""

    name: str
    relation: str  # a key of losses.relations.RELATIONS
    loss: Loss
    miner: Miner | None = None  # None keeps every pair
    memory: bool = False  # whether the cross-batch memory joins its columns
    sampled_proxies: int = 0  # how many proxies are drawn as its columns at a step; 0: all
    margin: Margin | None = None  # None: the one bound to the loss, in every row and at every step


class Combination(NamedTuple):
    """How the losses are weighted: a pair of pure functions, as in optax.

    ``init(objectives) -> (params, state)`` with the number of objectives;
    ``apply(params, state, losses, gradient_norms) -> (weights, params_gradient, state)`` with
    ``losses [o]``, ``gradient_norms [2 o]`` (row 0 at the embeddings, row 1 at the proxies) and
    ``weights [o]``. ``params_gradient`` goes to the optimiser of the contribution weights;
    ``state`` is what no optimiser trains (first losses, a counter).
    """

    init: Callable[[int], tuple[Params, Params]]
    apply: Callable[[Params, Params, Array, Array], tuple[Array, Params, Params]]


class ObjectiveState(NamedTuple):
    """What a :class:`mmljax.MultiObjective` carries from step to step and no optimiser trains."""

    step: Int[Array, ""]
    key: PRNGKeyArray
    combination: Params
    memory: dict[str, Array]  # vectors [m d], labels [m], next []; empty without memory


class TrainState(NamedTuple):
    """Everything that a run needs to resume: the content of a checkpoint.

    ``params`` has the keys ``network``, ``proxies`` (``[p d]``, sharded by rows) and ``weights``.
    """

    params: dict[str, Params]
    model_state: Params  # BatchNorm statistics
    objective: ObjectiveState
    optimizer_state: Params
    average: Params = ()  # keys network (of what is trained) and model_state; empty without one
    neighbors: Params = ()  # tables of mmljax.data.composition.Neighbors; empty without composition

    @property
    def evaluated(self) -> tuple[Params, Params]:
        """The network's parameters and statistics that are evaluated: the average, if any."""
        if self.average:
            network = overlaid(self.average["network"], self.params["network"])
            return network, self.average["model_state"]
        return self.params["network"], self.model_state

    @property
    def step(self) -> Int[Array, ""]:
        """Updates so far."""
        return self.objective.step


def overlaid(part: Params, whole: Params) -> Params:
    """The leaves of the first tree, and those of the second where the first has None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, part, whole, is_leaf=lambda x: x is None
    )
