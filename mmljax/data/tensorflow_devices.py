"""What TensorFlow may see of the machine: it only decodes images, the accelerators are JAX's."""

from __future__ import annotations


def visible_accelerators() -> list[str] | None:
    """Accelerators that TensorFlow would take memory of; none is left once ``pipeline`` is loaded.

    Returns:
      Their names; None where TensorFlow is absent.
    """
    try:
        import tensorflow as tf

        from mmljax.data import pipeline as pipeline  # hides them
    except ImportError:
        return None
    return [
        device.name for device in tf.config.get_visible_devices() if device.device_type != "CPU"
    ]
