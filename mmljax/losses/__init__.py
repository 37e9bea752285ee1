"""Losses on embeddings, labels and proxies, for any training loop.

The functions here take plain arrays and return a scalar. Under them are pure block functions:
losses of a block of similarities and masks (``pair``, ``ranking``, ``proxy``, ``separation``),
miners (``mining``) and rules that weight several losses (``combination``).
"""

from mmljax.losses.functional import (
    arcface,
    circle,
    contrastive,
    cosface,
    hyperspherical_energy,
    margin,
    multi_similarity,
    nearest_proxy,
    normalized_softmax,
    nt_xent,
    proxy_anchor,
    proxy_nca_pp,
    recall_at_k,
    smooth_ap,
    soft_orthogonality,
    soft_triple,
    soft_triple_regularizer,
    subcenter_arcface,
    supcon,
    triplet_all,
    triplet_hard,
    triplet_semihard,
)

__all__ = [
    "arcface",
    "circle",
    "contrastive",
    "cosface",
    "hyperspherical_energy",
    "margin",
    "multi_similarity",
    "nearest_proxy",
    "normalized_softmax",
    "nt_xent",
    "proxy_anchor",
    "proxy_nca_pp",
    "recall_at_k",
    "smooth_ap",
    "soft_orthogonality",
    "soft_triple",
    "soft_triple_regularizer",
    "subcenter_arcface",
    "supcon",
    "triplet_all",
    "triplet_hard",
    "triplet_semihard",
]
