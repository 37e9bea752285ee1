"""Every key of a run with its default; the recipes beside it change what differs.

What each key means stands beside it in ``mmljax/config.py``.
"""

from ml_collections import ConfigDict

import mmljax


def get_config() -> ConfigDict:
    """The defaults; not a run of its own, as they name no data."""
    return mmljax.default_config()
