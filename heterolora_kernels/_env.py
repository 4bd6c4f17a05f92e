"""Environment variables and probes of the machine, read when asked and never at import."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for files that commands fetch: ``HETEROLORA_CACHE``, else ``~/.cache/heterolora_kernels``."""
    chosen = os.environ.get("HETEROLORA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "heterolora_kernels"
