"""User options and the model's facts, resolved once into the sizes everything else uses."""

from jaxserve.config.engine import EngineConfig, cache_folder
from jaxserve.config.host_memory import HostMemory
from jaxserve.config.limits import Limits
from jaxserve.config.program import ProgramConfig
from jaxserve.config.states import States

__all__ = ["EngineConfig", "HostMemory", "Limits", "ProgramConfig", "States", "cache_folder"]
