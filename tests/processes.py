"""Watching and freezing other processes, as /proc shows them."""

import os
import signal
import time
from pathlib import Path


def running(pid: int) -> bool:
    """Whether the process is there and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def freeze(pid: int) -> None:
    """Stop a process, which then hangs. Its threads stop one after the other, and one that still runs may answer: wait for all."""
    os.kill(pid, signal.SIGSTOP)
    while any(" T " not in task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.01)
