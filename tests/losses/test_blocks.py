"""Every block loss against its loop."""

from __future__ import annotations

from functools import partial

import pytest
from loops import CASES

from objective_blocks import SIZES, check_against_loop, random_block


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_validity_and_gradient(case):
    check_against_loop(
        partial(case.block, **case.hyper),
        partial(case.loop, **case.hyper),
        centers=case.centers,
    )


def test_the_random_blocks_reach_both_sides_of_every_validity():
    for n, m in SIZES:
        _, masks = random_block(n, m, seed=n)
        some_positive, some_negative = (mask.any(axis=1) for mask in masks)
        assert {*zip(some_positive.tolist(), some_negative.tolist(), strict=True)} == {
            (a, b) for a in (False, True) for b in (False, True)
        }
        assert (~masks.positive & ~masks.negative).any()
