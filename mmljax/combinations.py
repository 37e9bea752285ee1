"""Rules that weight several losses; the notation is that of :mod:`mmljax.losses.combination`."""

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
