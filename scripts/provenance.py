"""What a committed result says of where it comes from."""

import platform
import subprocess
from pathlib import Path

import torch


def processor():
    """The name of the GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(*paths):
    """The commit of this checkout, with "+" if files differ from it: any that it tracks, or all in `paths`."""

    def git(*arguments):
        folder = Path(__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True).stdout.strip()

    status = git("status", "--porcelain", *(paths or ["--untracked-files=no"]))
    return git("rev-parse", "--short", "HEAD") + ("+" if status else "")
