"""Freed memory goes back to the system."""

import re
import sys
from pathlib import Path

import pytest

from hunyuan_jax import malloc


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    blocks = [
        bytes(1000) for _ in range(100_000)
    ]  # larger than what Python manages itself, smaller than what malloc maps
    last = bytes(1000)  # so the end of the heap is in use
    before = resident_mb()
    del blocks
    malloc.trim()
    assert resident_mb() < before - 60
    del last
