"""Rules that weight several losses: fixed or learned weights, and gradient surgery.

Contributions are measured where the objectives meet, at the embeddings and at the proxies. See
:mod:`mmljax.losses.combination` for the notation.
"""

from mmljax.losses.combination import (
    contribution_shares,
    fixed,
    gradnorm,
    pcgrad_coefficients,
    random,
    share,
    uncertainty,
)

__all__ = [
    "contribution_shares",
    "fixed",
    "gradnorm",
    "pcgrad_coefficients",
    "random",
    "share",
    "uncertainty",
]
