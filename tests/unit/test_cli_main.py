"""What the command does for its own process before any verb."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from vlduet.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "let go")
    }
    pages = 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults["let go"] > pages // 2
    assert faults["keep"] < pages // 5
