"""Slow loops written from the papers' equations, in Python floats.

A loop takes a row of cosines as a list, two lists of columns (positives and negatives), the row at
which the gradient is taken (for what is constant to it), and hyperparameters. It returns the value
of the row, or None where the row does not enter the mean; a tuple of these for several terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mmljax.losses import pair, proxy, ranking, separation


def hinge(z):
    return z if z > 0 else 0.0


def distance(s):
    return math.sqrt(2 - 2 * s)


def multi_similarity(s, positives, negatives, _, alpha=2.0, beta=40.0, base=0.5):
    attraction = repulsion = 0.0
    for j in positives:
        attraction += math.exp(-alpha * (s[j] - base))
    for j in negatives:
        repulsion += math.exp(beta * (s[j] - base))
    return math.log(1 + attraction) / alpha + math.log(1 + repulsion) / beta


def contrastive(s, positives, negatives, _, positive_margin, negative_margin):
    total = 0.0
    for j in positives:
        total += hinge(positive_margin - s[j])
    for j in negatives:
        total += hinge(s[j] - negative_margin)
    return total


def triplet_hard(s, positives, negatives, _, margin):
    if not positives or not negatives:
        return None
    worst = -math.inf  # over all triplets: the violation of the margin in squared distance
    for p in positives:
        for n in negatives:
            worst = max(worst, 2 * margin + distance(s[p]) ** 2 - distance(s[n]) ** 2)
    return hinge(worst) / 2


def triplet_semihard(s, positives, negatives, _, margin):
    found = []
    for p in positives:
        farther = [distance(s[n]) for n in negatives if distance(s[n]) > distance(s[p])]
        if farther:
            violation = distance(s[p]) ** 2 - min(farther) ** 2 + 2 * margin
            found.append(hinge(violation) / 2)
    return sum(found) / len(found) if found else None


def triplet_all(s, positives, negatives, _, margin):
    found = []
    for p in positives:
        for n in negatives:
            violation = margin + s[n] - s[p]
            if violation > 0:
                found.append(violation)
    return sum(found) / len(found) if found else None


def margin(s, positives, negatives, _, margin=0.2, beta=1.2):
    found = []
    for sign, columns in ((1, positives), (-1, negatives)):
        for j in columns:
            violation = margin + sign * (distance(s[j]) - beta)
            if violation > 0:
                found.append(violation)
    return sum(found) / len(found) if found else None


def circle(s, positives, negatives, at, margin, gamma):
    if not positives or not negatives:
        return None
    total = 0.0
    for p in positives:
        for n in negatives:
            weight_p, weight_n = hinge(1 + margin - at[p]), hinge(at[n] + margin)
            exponent = weight_n * (s[n] - margin) - weight_p * (s[p] - (1 - margin))
            total += math.exp(gamma * exponent)
    return math.log(1 + total)


def supcon(s, positives, negatives, _, temperature=0.1):
    if not positives:
        return None
    total = 0.0
    for p in positives:
        everything = 0.0
        for j in positives + negatives:
            everything += math.exp(s[j] / temperature)
        total -= math.log(math.exp(s[p] / temperature) / everything)
    return total / len(positives)


def nt_xent(s, positives, negatives, _, temperature):
    if not positives:
        return None
    total = 0.0
    for p in positives:
        everything = math.exp(s[p] / temperature)
        for n in negatives:
            everything += math.exp(s[n] / temperature)
        total -= math.log(math.exp(s[p] / temperature) / everything)
    return total / len(positives)


def smooth_ap(s, positives, negatives, _, temperature):
    if not positives:
        return None

    def rank(i, columns):
        found = 1.0
        for j in columns:
            if j != i:
                found += 1 / (1 + math.exp(-(s[j] - s[i]) / temperature))
        return found

    precision = 0.0
    for i in positives:
        precision += rank(i, positives) / rank(i, positives + negatives)
    return 1 - precision / len(positives)


def recall_at_k(s, positives, negatives, _, temperature, ks=(1, 2, 4, 8, 16), rank_temperature=1.0):
    if not positives:
        return None

    def sigmoid(z):
        return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))

    recall = 0.0
    for k in ks:
        found = 0.0
        for x in positives:
            ahead = 0.0
            for z in positives + negatives:
                if z != x:
                    ahead += sigmoid((s[z] - s[x]) / temperature)
            found += sigmoid((k - 1 - ahead) / rank_temperature)
        recall += min(k, found) / min(k, len(positives))
    return 1 - recall / len(ks)


def proxy_anchor(s, positives, negatives, _, alpha=32.0, margin=0.1):
    attraction = sum(math.exp(-alpha * (s[j] - margin)) for j in positives)
    repulsion = sum(math.exp(alpha * (s[j] + margin)) for j in negatives)
    return math.log(1 + attraction) if positives else None, math.log(1 + repulsion)


def cross_entropy(own, others):
    """``own``, ``others``: logits of the own class's columns and of the other classes'."""
    if not own:
        return None
    numerator = sum(math.exp(z) for z in own)
    denominator = numerator + sum(math.exp(z) for z in others)
    return -math.log(numerator / denominator)


def proxy_nca_pp(s, positives, negatives, _, temperature=1 / 9):
    def logit(j):
        return -(math.sqrt(2 - 2 * s[j]) ** 2) / temperature

    return cross_entropy([logit(j) for j in positives], [logit(j) for j in negatives])


def normalized_softmax(s, positives, negatives, _, temperature):
    return cross_entropy(
        [s[j] / temperature for j in positives], [s[j] / temperature for j in negatives]
    )


def cosface(s, positives, negatives, _, scale, margin):
    return cross_entropy(
        [scale * (s[j] - margin) for j in positives], [scale * s[j] for j in negatives]
    )


def arcface_logit(s, scale, margin):
    angle = math.acos(s)
    if angle < math.pi - margin:
        return scale * math.cos(angle + margin)
    return scale * (s - margin * math.sin(margin))


def arcface(s, positives, negatives, _, scale, margin):
    return cross_entropy(
        [arcface_logit(s[j], scale, margin) for j in positives], [scale * s[j] for j in negatives]
    )


def by_class(columns, centers):
    groups = {}
    for j in columns:
        groups.setdefault(j // centers, []).append(j)
    return list(groups.values())


def subcenter_arcface(s, positives, negatives, _, scale, margin, centers):
    own, others = (
        [max(s[j] for j in group) for group in by_class(columns, centers)]
        for columns in (positives, negatives)
    )
    return cross_entropy(
        [arcface_logit(z, scale, margin) for z in own], [scale * z for z in others]
    )


def soft_triple(s, positives, negatives, _, centers, scale=20.0, gamma=0.1, margin=0.01):
    def relaxed(group):
        total = sum(math.exp(s[j] / gamma) for j in group)
        return sum(math.exp(s[j] / gamma) / total * s[j] for j in group)

    own = [scale * (relaxed(group) - margin) for group in by_class(positives, centers)]
    return cross_entropy(own, [scale * relaxed(group) for group in by_class(negatives, centers)])


def nearest_proxy(s, positives, negatives, _, gamma=32.0, margin=0.1):
    return math.log(1 + sum(math.exp(gamma * (s[j] - margin)) for j in negatives)) / gamma


def soft_orthogonality(s, positives, negatives, _):
    return sum(s[j] * s[j] for j in negatives)


def hyperspherical_energy(s, positives, negatives, _, power=2.0):
    total = 0.0
    for j in negatives:
        d = math.sqrt(2 - 2 * s[j])
        total += math.log(1 / d) if power == 0 else 1 / d**power
    return total / max(len(negatives), 1)


def soft_triple_regularizer(s, positives, negatives, _):
    if not positives:
        return None
    return sum(math.sqrt(2 - 2 * s[j]) for j in positives) / len(positives) / 2


class Case(NamedTuple):
    """A public loss, its block form, its loop and the hyperparameters of a test."""

    name: str
    block: object
    loop: object
    hyper: dict

    @property
    def centers(self):
        """Proxies per class; 0 where the columns are samples."""
        softmax = self.block.__module__.endswith("proxy") and self.name != "proxy_anchor"
        return self.hyper.get("centers", int(softmax))


CASES = [
    Case(name, block, globals()[name], hyper)
    for name, block, hyper in [
        ("multi_similarity", pair.multi_similarity_loss, {}),
        (
            "multi_similarity",
            pair.multi_similarity_loss,
            {"alpha": 9.0, "beta": 5.0, "base": -0.2},
        ),
        ("contrastive", pair.contrastive_loss, {"positive_margin": 0.9, "negative_margin": 0.1}),
        ("triplet_hard", pair.triplet_hard_loss, {"margin": 0.2}),
        ("triplet_semihard", pair.triplet_semihard_loss, {"margin": 0.5}),
        ("triplet_all", pair.triplet_all_loss, {"margin": 0.3}),
        ("margin", pair.margin_loss, {}),
        ("circle", pair.circle_loss, {"margin": 0.4, "gamma": 8.0}),
        ("supcon", pair.supcon_loss, {}),
        ("nt_xent", pair.nt_xent_loss, {"temperature": 0.2}),
        ("smooth_ap", ranking.smooth_ap_loss, {"temperature": 0.1}),
        ("recall_at_k", ranking.recall_at_k_loss, {"temperature": 0.1, "rank_temperature": 0.7}),
        ("recall_at_k", ranking.recall_at_k_loss, {"ks": (3, 1), "temperature": 0.3}),
        ("proxy_anchor", proxy.proxy_anchor_loss, {}),
        ("proxy_nca_pp", proxy.proxy_nca_pp_loss, {}),
        ("normalized_softmax", proxy.normalized_softmax_loss, {"temperature": 0.1}),
        ("cosface", proxy.cosface_loss, {"scale": 16.0, "margin": 0.35}),
        ("arcface", proxy.arcface_loss, {"scale": 16.0, "margin": 0.5}),
        ("arcface", proxy.arcface_loss, {"scale": 4.0, "margin": 1.3}),  # most beyond pi - margin
        (
            "subcenter_arcface",
            proxy.subcenter_arcface_loss,
            {"scale": 8.0, "margin": 0.5, "centers": 3},
        ),
        ("soft_triple", proxy.soft_triple_loss, {"centers": 2}),
        ("nearest_proxy", separation.nearest_proxy_separation_loss, {}),
        ("soft_orthogonality", separation.soft_orthogonality_loss, {}),
        ("hyperspherical_energy", separation.hyperspherical_energy_loss, {"power": 0.0}),
        ("hyperspherical_energy", separation.hyperspherical_energy_loss, {"power": 1.0}),
        ("hyperspherical_energy", separation.hyperspherical_energy_loss, {}),
        ("soft_triple_regularizer", separation.soft_triple_regularizer, {}),
    ]
]
