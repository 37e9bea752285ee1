"""PyTorch's side of a benchmark or test: torchvision where its operators do not load."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any


def import_torchvision() -> Any:
    """Import torchvision, also beside a torch of another build.

    Its compiled operators (for boxes, unused here) do not load then, and the package cannot be
    imported unless their names are declared first.

    Raises:
      ImportError: if torch or torchvision is absent.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own deprecations
        import torch

        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise ImportError("torchvision is absent")
        try:
            torch.ops.load_library(Path(spec.origin).parent / "_C.so")
        except OSError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool"):
                library.define(f"{name}(Tensor x) -> Tensor")
        import torchvision
    return torchvision
