"""Environments: `make(config)` gives a pool of episodes that are stepped together."""

from __future__ import annotations

from gcdlite.config import Config
from gcdlite.envs.base import Pool


def make(config: Config) -> Pool:
    """The pool for `env.name`. Raises UserError when its data or its engine is missing."""
    from gcdlite.envs.alfworld import AlfworldPool

    return AlfworldPool(config)
