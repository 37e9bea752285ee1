"""TensorFlow without accelerators: it only decodes images, the accelerators belong to JAX."""

from __future__ import annotations

from typing import Any


def import_tensorflow() -> Any:
    """The module ``tensorflow``, with its GPUs hidden so that it takes no memory of them.

    Raises:
      ImportError: if TensorFlow is not installed.
    """
    import tensorflow as tf

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
