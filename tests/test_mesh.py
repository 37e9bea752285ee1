"""The rows that a process loads, and the devices that a run takes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import pytest

from mmljax import mesh
from mmljax.errors import Unreachable, UserError
from mmljax.mesh import make_mesh, process_rows, raise_together


@pytest.mark.parametrize(
    ("size", "images_per_class", "proposed"),
    [(100, 3, 96), (100, 1, 96), (5, 1, 8), (20, 12, 24), (180, 5, 160)],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    size: int, images_per_class: int, proposed: int
) -> None:
    """Over the eight devices of the tests, and over images of a class."""
    with pytest.raises(UserError) as error:
        process_rows(size, key="config.data.batch_size", multiple_of=images_per_class)
    text = f"--config.data.batch_size={size} is not divisible by the 8 devices; use {proposed}"
    assert str(error.value) == text


def test_one_process_loads_all_rows() -> None:
    assert process_rows(96, key="config.data.batch_size") == slice(0, 96)


class Chip(NamedTuple):
    """A device, as far as a mesh is refused for it."""

    platform: str
    slice_index: int


def test_tpu_devices_of_several_slices_are_refused() -> None:
    with pytest.raises(UserError, match="of 2 TPU slices, but a run takes those of one"):
        make_mesh([Chip("tpu", 0), Chip("tpu", 1), Chip("tpu", 0)])


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_all_processes_raise_the_problem_of_the_first(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its exit code, so that a launcher starts all of them again, or none."""
    raise_together(None, otherwise="see there")
    problem = kind("here")
    with pytest.raises(kind) as error:
        raise_together(problem, otherwise="see there")
    assert error.value is problem

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        mesh.multihost_utils, "broadcast_one_to_all", lambda mine: np.array(kind.exit_code)
    )
    with pytest.raises(UserError, match="see there") as error:
        raise_together(UserError("its own"), otherwise="see there")
    assert type(error.value) is kind
