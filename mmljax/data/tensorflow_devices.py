"""TensorFlow without accelerators: it only decodes images, the accelerators belong to JAX."""

from __future__ import annotations

import os
from typing import Any


def import_tensorflow() -> Any:
    """The module ``tensorflow``, with its GPUs hidden so that it takes no memory of them.

    Its threads are set up for the input, which makes many images at a time (``benchmarks.input``):
    one operation takes one thread; there are two more threads than CPUs, since two wait for the
    batches that are being made; idle ones sleep, where TensorFlow's would spin first and take CPU
    time from the others and from JAX. The last has no public switch after TensorFlow's import, so a
    private one is used. All this has no effect once TensorFlow runs; ``tf.config.threading``
    overrides the numbers before.

    Raises:
      ImportError: if TensorFlow is not installed.
    """
    import tensorflow as tf
    from tensorflow.python.eager import context

    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=(os.cpu_count() or 1) + 2
    )
    config.experimental.disable_thread_spinning = True
    context.context()._config = config
    tf.config.set_visible_devices([], "GPU")
    return tf


def visible_accelerators() -> list[str] | None:
    """Names of the accelerators that TensorFlow still sees; None if TensorFlow is not installed."""
    try:
        tf = import_tensorflow()
    except ImportError:
        return None
    return [
        device.name for device in tf.config.get_visible_devices() if device.device_type != "CPU"
    ]
