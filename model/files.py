"""Writing files so that a kill or a power loss leaves the old ones or the new ones, never half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"  # before the name of what is not whole yet


def flush(path: Path) -> None:
    """A file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: a reader, or a restart after a kill, sees the old one or the new one."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)
