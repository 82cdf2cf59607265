"""Environments: `make(config)` gives a pool of episodes that are stepped together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gcdlite.config import Config
from gcdlite.envs.base import Pool


def make(config: Config) -> Pool:
    """The pool for `env.name`. Raises UserError when its data or its engine is missing."""
    if config.env.name == "scienceworld":
        from gcdlite.envs.scienceworld import ScienceWorldPool

        return ScienceWorldPool(config)
    from gcdlite.envs.alfworld import AlfworldPool

    return AlfworldPool(config)


def describe(config: Config) -> str:
    """What will be played, and why, in one line; starts and generates nothing. Raises UserError when something is missing."""
    if config.env.name == "scienceworld":
        from gcdlite.envs import scienceworld

        return scienceworld.describe(config)
    from gcdlite.envs.alfworld.games import data_root

    root, why = data_root(config.env.data)
    return f"{why}: {root}" if root else why


@contextmanager
def closing(pool: Pool) -> Iterator[Pool]:
    """Close the pool however the run ends; a polite kill (SIGTERM) ends it like Ctrl-C."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs us handles signals
        before = None
    try:
        yield pool
    finally:
        pool.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
