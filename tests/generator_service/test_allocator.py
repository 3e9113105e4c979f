from __future__ import annotations

import platform
import subprocess
import sys

PROGRAM = "from generator_service.allocator import keep_freed_memory; print(keep_freed_memory())"


def test_the_c_library_takes_the_settings():
    """In a process of its own; what they are worth is measured by the service's benchmark."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
