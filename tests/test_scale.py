"""Collectives of the compiled step grow with the devices as docs/scale.md says."""

from __future__ import annotations

import argparse

import jax
import pytest

from benchmarks.scale import make_config
from mmljax.mesh import make_mesh
from mmljax.planning.counts import Counts
from mmljax.planning.hlo_text import argument_bytes, collectives
from mmljax.planning.programs import abstract_run, lower_step


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
    run = abstract_run(config, Counts(2048, 20480), make_mesh(jax.devices()[:devices]))
    program = lower_step(run, config, channels=3).compile()
    found = collectives(program.as_text())
    row = 4 * config.model.embedding_size
    network = sum(4 * x.size for x in jax.tree.leaves(run.state.params["network"]))
    assert found["all-gather"].bytes == batch * (row + 9)
    assert found["reduce-scatter"].bytes == 3 * batch * row
    # Besides, the statistics of BatchNorm and the ledger.
    assert 0 < found["all-reduce"].bytes - network - 2 * sampled * row < 0.01 * network
    # CPU has no tiles: the compiler's figure is that of the text.
    assert argument_bytes(program.as_text()) == program.memory_analysis().argument_size_in_bytes
