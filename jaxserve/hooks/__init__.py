"""Functions at points inside the model: see docs/guide/hooks.md."""

from jaxserve.hooks.context import HookContext
from jaxserve.hooks.points import POINTS

__all__ = ["POINTS", "HookContext"]
