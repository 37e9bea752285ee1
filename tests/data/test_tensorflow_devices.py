"""How TensorFlow is set up beside JAX."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("tensorflow", reason="it is what is set up")

import tensorflow as tf

from mmljax.data.tensorflow_devices import import_tensorflow


def test_threads_are_those_of_an_input_that_makes_many_images_at_a_time() -> None:
    import_tensorflow()
    config = tf.__internal__.eager_context.get_config()
    assert config.intra_op_parallelism_threads == 1
    assert config.inter_op_parallelism_threads == os.cpu_count() + 2
    assert config.experimental.disable_thread_spinning
