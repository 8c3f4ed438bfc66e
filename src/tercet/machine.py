"""What this machine has, as far as the operating system tells."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes() -> int:
    """Main memory, or the container's limit where that is less."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(there, int(said)) if said.isdigit() else there
