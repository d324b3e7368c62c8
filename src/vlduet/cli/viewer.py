"""The system's viewer of images."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

START_SECONDS = 1.0
"""Seconds that a viewer has to report that it cannot show an image."""


def find_viewer() -> str | None:
    """Return the program that opens files in the desktop's viewers; None without a desktop."""
    if sys.platform == "darwin":
        return shutil.which("open")
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return shutil.which("xdg-open") if has_display else None


def open_in_viewer(viewer: str, file: Path) -> bool:
    """Start a viewer of a file and return whether it runs, or has ended with success.

    No shell reads the file's name. The viewer gets no input, its messages are dropped, and it
    outlives this process. It is waited for `START_SECONDS` at most.
    """
    # An absolute path does not begin with a dash, which would be an option.
    command = [viewer, str(file.absolute())]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return False
    try:
        return process.wait(START_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return True
