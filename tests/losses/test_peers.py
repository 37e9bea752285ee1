"""Public losses against pytorch-metric-learning: value and gradient in float64.

Both sides start from the same raw vectors and normalise them. Where ours differs on purpose, the
test states the difference and checks it.
"""

from __future__ import annotations

import importlib
import math
import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax import losses
from mmljax.losses import registry
from mmljax.losses.margins import dynamic_margins
from mmljax.numerics import l2_normalize, similarity_matrix
from mmljax.types import PairMasks
from objective_blocks import quick_jit

pytestmark = pytest.mark.slow

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 1])  # class 3 has one sample
CLASSES, DIMENSIONS = 5, 4  # class 4 has none
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        torch = pytest.importorskip("torch", reason="pip install mmljax[peers]")
        pml = pytest.importorskip("pytorch_metric_learning", reason="pip install mmljax[peers]")
        for name in ("distances", "losses", "miners", "reducers", "regularizers"):
            importlib.import_module(f"pytorch_metric_learning.{name}")
    torch.set_num_threads(1)
    return SimpleNamespace(torch=torch, **vars(pml))


def embeddings(labels=LABELS):
    return np.random.default_rng(0).normal(size=(len(labels), DIMENSIONS))


def proxies(centers=1):
    return np.random.default_rng(1).normal(size=(CLASSES * centers, DIMENSIONS))


def sample_masks(labels=LABELS, keep_self=False):
    same = labels[:, None] == labels
    itself = np.eye(len(labels), dtype=bool) & (not keep_self)
    return PairMasks(same & ~itself, ~same)


def weighted_by(rows, loss, masks):
    """The loss with its anchors weighted, for peers that do not average over anchors."""
    block = partial(registry.LOSSES[loss.func.__name__][1], **loss.keywords)

    def total(x, _):
        unit = l2_normalize(x)
        return jnp.sum(block(similarity_matrix(unit, unit), masks).value * rows) / rows.sum()

    return total


def ours(loss, *arrays):
    """A loss and its gradients at the arrays, in float64."""
    with jax.enable_x64(True):
        compiled = quick_jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))
        return jax.tree.map(np.asarray, compiled(*arrays))


def theirs(peer, function, *arrays):
    """A torch function's value and its gradients at the arrays."""
    tensors = [peer.torch.tensor(array, requires_grad=True) for array in arrays]
    value = function(*tensors)
    value.backward()
    return value.item(), [tensor.grad.numpy() for tensor in tensors]


def check_samples(peer, loss, function, *, labels=LABELS):
    x = embeddings(labels)
    value, (gradient,) = ours(lambda x: loss(x, labels), x)
    expected, (expected_gradient,) = theirs(peer, function, x)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, **TOLERANCE)


def labelled(peer, loss, labels=LABELS):
    return lambda x: loss(x, peer.torch.tensor(labels))


def triplets_of(peer, loss, x, indices=None):
    """A triplet loss's own values, with the anchor of each."""
    found = loss(x, peer.torch.tensor(LABELS), indices)["loss"]
    return found["losses"], found["indices"][0]


def mean_per_anchor(peer, values, anchors):
    """Mean over each anchor's values that are not 0, then over the anchors that have one."""
    torch, rows = peer.torch, []
    for anchor in torch.unique(anchors):
        own = values[(anchors == anchor) & (values > 0)]
        rows += [own.mean()] if len(own) else []
    return torch.stack(rows).mean()


def test_multi_similarity(peer):
    check_samples(
        peer,
        partial(losses.multi_similarity, alpha=2.0, beta=40.0, base=0.5),
        labelled(peer, peer.losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5)),
    )


def test_contrastive(peer):
    """Ours is the sum of an anchor's pairs over the number of anchors: the peer's with SumReducer.

    The peer's default is the mean over the non-zero pairs of each kind.
    """
    loss = peer.losses.ContrastiveLoss(
        pos_margin=0.9,
        neg_margin=0.2,
        distance=peer.distances.CosineSimilarity(),
        reducer=peer.reducers.SumReducer(),
    )
    check_samples(
        peer,
        partial(losses.contrastive, positive_margin=0.9, negative_margin=0.2),
        lambda x: loss(x, peer.torch.tensor(LABELS)) / len(LABELS),
    )


def test_triplet_hard(peer):
    """The peer's default reducer averages the non-zero triplets alone, ours all anchors."""
    miner = peer.miners.BatchHardMiner(distance=peer.distances.CosineSimilarity())
    loss = peer.losses.TripletMarginLoss(
        margin=0.1,
        distance=peer.distances.CosineSimilarity(),
        reducer=peer.reducers.MeanReducer(),
    )
    labels = peer.torch.tensor(LABELS)
    check_samples(
        peer,
        partial(losses.triplet_hard, margin=0.1),
        lambda x: loss(x, labels, miner(x, labels)),
    )


def test_triplet_all(peer):
    """Ours averages per anchor first; the peer's triplets are reduced so here."""
    loss = peer.losses.TripletMarginLoss(
        margin=0.2,
        distance=peer.distances.CosineSimilarity(),
        reducer=peer.reducers.DoNothingReducer(),
    )
    check_samples(
        peer,
        partial(losses.triplet_all, margin=0.2),
        lambda x: mean_per_anchor(peer, *triplets_of(peer, loss, x)),
    )


def test_triplet_all_is_the_peers_own_mean_where_anchors_weigh_by_their_triplets(peer):
    """Weighted by the number of active triplets of each anchor, both are equal."""
    x = embeddings() / np.linalg.norm(embeddings(), axis=1, keepdims=True)
    s, masks = x @ x.T, sample_masks()
    violation = 0.2 + s[:, None, :] - s[:, :, None]
    triplets = masks.positive[:, :, None] & masks.negative[:, None, :]
    count = np.sum(triplets & (violation > 0), axis=(1, 2))
    assert len(set(count)) > 2
    loss = peer.losses.TripletMarginLoss(margin=0.2, distance=peer.distances.CosineSimilarity())
    check_samples(
        peer,
        weighted_by(count, partial(losses.triplet_all, margin=0.2), masks),
        labelled(peer, loss),
    )


def test_triplet_semihard(peer):
    """The peer keeps every negative of the band; of these ours takes each positive's nearest."""
    torch = peer.torch
    cosine = peer.distances.CosineSimilarity()
    miner = peer.miners.TripletMarginMiner(
        margin=10.0, type_of_triplets="semihard", distance=cosine
    )
    loss = peer.losses.TripletMarginLoss(
        margin=0.3, distance=cosine, reducer=peer.reducers.DoNothingReducer()
    )

    def function(x):
        anchors, positives, negatives = miner(x, torch.tensor(LABELS))
        values, _ = triplets_of(peer, loss, x, (anchors, positives, negatives))
        rows = []
        for a in torch.unique(anchors):
            own = [
                values[(anchors == a) & (positives == p)].max()
                for p in torch.unique(positives[anchors == a])
            ]
            rows.append(torch.stack(own).mean())
        return torch.stack(rows).mean()

    check_samples(peer, partial(losses.triplet_semihard, margin=0.3), function)


def test_margin(peer):
    """The peer pairs each positive with each negative and divides by all that are active.

    With one positive and one negative per anchor, and anchors weighted by their active pairs,
    both are the same.
    """
    torch = peer.torch
    rng = np.random.default_rng(3)
    full = sample_masks()
    chosen = [
        [rng.choice(np.flatnonzero(mask[i])) for mask in full]
        for i in range(len(LABELS))
        if full.positive[i].any()
    ]
    anchors = np.flatnonzero(full.positive.any(axis=1))
    masks = PairMasks(*np.zeros((2, len(LABELS), len(LABELS)), bool))
    for mask, columns in zip(masks, np.transpose(chosen), strict=True):
        mask[anchors, columns] = True
    indices = tuple(map(torch.tensor, (anchors, *np.transpose(chosen))))
    loss = peer.losses.MarginLoss(margin=0.2, beta=1.0)
    x = embeddings() / np.linalg.norm(embeddings(), axis=1, keepdims=True)
    distance = np.linalg.norm(x[:, None] - x, axis=-1)
    active = np.sum(masks.positive & (distance > 0.8), 1) + np.sum(
        masks.negative & (distance < 1.2), 1
    )
    assert set(active) == {0, 1, 2}
    check_samples(
        peer,
        weighted_by(active, partial(losses.margin, margin=0.2, beta=1.0), masks),
        lambda x: loss(x, torch.tensor(LABELS), indices),
    )


def test_circle(peer):
    check_samples(
        peer,
        partial(losses.circle, margin=0.4, gamma=80.0),
        labelled(peer, peer.losses.CircleLoss(m=0.4, gamma=80)),
    )


def test_supcon(peer):
    check_samples(
        peer,
        partial(losses.supcon, temperature=0.1),
        labelled(peer, peer.losses.SupConLoss(temperature=0.1)),
    )


def test_nt_xent(peer):
    """The peer averages over positive pairs, ours over anchors: one where all have as many."""
    labels = np.repeat(np.arange(4), 3)
    check_samples(
        peer,
        partial(losses.nt_xent, temperature=0.2),
        labelled(peer, peer.losses.NTXentLoss(temperature=0.2), labels),
        labels=labels,
    )
    count = sample_masks().positive.sum(axis=1)
    check_samples(
        peer,
        weighted_by(count, partial(losses.nt_xent, temperature=0.2), sample_masks()),
        labelled(peer, peer.losses.NTXentLoss(temperature=0.2)),
    )


def test_smooth_ap(peer):
    """The peer counts the query among its own positives; so does ours if the mask says so.

    The peer needs samples sorted by class, and mistakes the size of a class for the number of
    classes, so the two must be equal.
    """
    labels = np.repeat(np.arange(4), 4)
    loss = partial(losses.smooth_ap, temperature=0.05)
    with_query = labelled(peer, peer.losses.SmoothAPLoss(temperature=0.05), labels)
    own = sample_masks(labels, keep_self=True)
    check_samples(peer, partial(loss, pairs=own), with_query, labels=labels)
    x = embeddings(labels)
    without, _ = ours(lambda x: loss(x, labels), x)
    assert without > with_query(peer.torch.tensor(x)).item() + 0.05  # a query finds itself first


def check_proxies(peer, loss, torch_loss, *, weights, centers=1):
    """``weights``: the name of the peer's proxies, ``W`` and ``fc`` with classes as columns."""
    p, x = proxies(centers), embeddings()
    parameter = getattr(torch_loss, weights)
    transposed = parameter.shape[0] == DIMENSIONS and weights != "proxies"
    parameter.data = peer.torch.tensor(p.T if transposed else p)
    expected, (at_samples,) = theirs(peer, labelled(peer, torch_loss), x)
    at_proxies = parameter.grad.numpy()
    value, gradients = ours(lambda x, p: loss(x, LABELS, p), x, p)
    assert abs(value) > 1e-3
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    np.testing.assert_allclose(gradients[0], at_samples, **TOLERANCE)
    np.testing.assert_allclose(
        gradients[1], at_proxies.T if transposed else at_proxies, **TOLERANCE
    )


def test_proxy_anchor(peer):
    check_proxies(
        peer,
        partial(losses.proxy_anchor, alpha=32.0, margin=0.1),
        peer.losses.ProxyAnchorLoss(CLASSES, DIMENSIONS, margin=0.1, alpha=32),
        weights="proxies",
    )


def test_proxy_nca_pp(peer):
    """The peer's ProxyNCA has the own proxy in its softmax: on the sphere it is ProxyNCA++."""
    check_proxies(
        peer,
        partial(losses.proxy_nca_pp, temperature=1 / 9),
        peer.losses.ProxyNCALoss(CLASSES, DIMENSIONS, softmax_scale=9),
        weights="proxies",
    )


def test_normalized_softmax(peer):
    check_proxies(
        peer,
        partial(losses.normalized_softmax, temperature=0.05),
        peer.losses.NormalizedSoftmaxLoss(CLASSES, DIMENSIONS, temperature=0.05),
        weights="W",
    )


def test_cosface(peer):
    check_proxies(
        peer,
        partial(losses.cosface, scale=16.0, margin=0.35),
        peer.losses.CosFaceLoss(CLASSES, DIMENSIONS, margin=0.35, scale=16),
        weights="W",
    )


@pytest.mark.parametrize("degrees", [28.6, 80.0])  # the second: many angles beyond pi - margin
def test_arcface(peer, degrees):
    check_proxies(
        peer,
        partial(losses.arcface, scale=16.0, margin=math.radians(degrees)),
        peer.losses.ArcFaceLoss(CLASSES, DIMENSIONS, margin=degrees, scale=16),
        weights="W",
    )


def test_subcenter_arcface(peer):
    check_proxies(
        peer,
        partial(losses.subcenter_arcface, scale=16.0, margin=math.radians(28.6), centers=3),
        peer.losses.SubCenterArcFaceLoss(
            num_classes=CLASSES, embedding_size=DIMENSIONS, margin=28.6, scale=16, sub_centers=3
        ),
        weights="W",
        centers=3,
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # np.sin of a tensor
@pytest.mark.parametrize("name", ["cosface", "arcface", "subcenter_arcface"])
def test_a_margin_per_class(peer, name):
    """The peer's margin is one number; the margins of the rows take its place there."""
    margins = dynamic_margins([4, 3, 60, 1, 500], least=0.05, most=0.6)
    kind = {"num_classes": CLASSES, "embedding_size": DIMENSIONS, "scale": 16}
    centers = 3 if name == "subcenter_arcface" else 1
    torch_loss = {
        "cosface": peer.losses.CosFaceLoss,
        "arcface": peer.losses.ArcFaceLoss,
        "subcenter_arcface": partial(peer.losses.SubCenterArcFaceLoss, sub_centers=3),
    }[name](**kind)
    torch_loss.margin = peer.torch.tensor(margins[LABELS])
    hyper = {"scale": 16.0, "margin": margins} | ({"centers": 3} if centers > 1 else {})
    loss = partial(getattr(losses, name), **hyper)
    check_proxies(peer, loss, torch_loss, weights="W", centers=centers)


def test_soft_triple(peer):
    check_proxies(
        peer,
        partial(losses.soft_triple, scale=20.0, gamma=0.1, margin=0.01, centers=2),
        peer.losses.SoftTripleLoss(
            CLASSES, DIMENSIONS, centers_per_class=2, la=20, gamma=0.1, margin=0.01
        ),
        weights="fc",
        centers=2,
    )


def test_separation_has_the_regularface_regularizer_as_its_sharp_limit(peer):
    """At a great gamma and a margin below all cosines: the nearest cosine minus the margin."""
    p = proxies()
    value, (gradient,) = ours(lambda p: losses.nearest_proxy(p, gamma=1e5, margin=-2.0) - 2.0, p)
    expected, (expected_gradient,) = theirs(peer, peer.regularizers.RegularFaceRegularizer(), p)
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, **TOLERANCE)
