"""Collectives of the compiled step grow with the devices as docs/scale.md says."""

from __future__ import annotations

import argparse

import jax
import pytest

from benchmarks.scale import Traffic, collectives, compile_step, make_config

PROGRAM = """
  %a = f32[16,512]{1,0} fusion(%p)
  %g.1 = f32[64,512]{1,0} all-gather(%a), channel_id=1, dimensions={0}
  %r = bf16[4]{0} reduce-scatter(%h), channel_id=1
  %h = bf16[16]{0} fusion(%p)
  %s = (f32[2,2]{1,0}, s32[]) all-reduce(%x, %y), channel_id=1
  %t = f32[3]{0} all-reduce-start(f32[3]{0} %z), channel_id=1
  %u = f32[3]{0} all-reduce-done(%t)
"""


def test_collectives_are_read_from_a_program() -> None:
    assert collectives(PROGRAM) == {
        "all-gather": Traffic(1, 64 * 512 * 4),
        "reduce-scatter": Traffic(1, 16 * 2),
        "all-reduce": Traffic(2, 16 + 4 + 12),
    }


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_weak_scaling(devices: int) -> None:
    """The same images and the same classes in all; twice the devices, twice the batch."""
    batch, sampled = 16 * devices, 256
    options = argparse.Namespace(
        backbone="small_stride4",
        image_size=16,
        batch_size=batch,
        sampled_proxies=sampled,
        row_block=0,
    )
    config = make_config(options)
    program, state = compile_step(config, classes=2048, devices=devices)
    found = collectives(program.as_text())
    row = 4 * config.model.embedding_size
    network = sum(4 * x.size for x in jax.tree.leaves(state.params["network"]))
    assert found["all-gather"].bytes == batch * (row + 9)
    assert found["reduce-scatter"].bytes == 3 * batch * row
    # Besides, the statistics of BatchNorm and the ledger.
    assert 0 < found["all-reduce"].bytes - network - 2 * sampled * row < 0.01 * network
