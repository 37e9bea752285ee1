"""Tests for mmljax.allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from mmljax.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24)  # 128 MiB, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
faults()
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("chosen", [False, True])
def test_freed_memory_is_used_again_unless_the_environment_says_how_to_allocate(
    chosen: bool,
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if chosen:
        environment["MALLOC_TOP_PAD_"] = "131072"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    if kept == "False" and not chosen:
        pytest.skip("an accelerator's driver is present, or the C library is not glibc")
    assert (kept == "True") == (not chosen)
    assert int(faults) < 100 if kept == "True" else int(faults) > 0
