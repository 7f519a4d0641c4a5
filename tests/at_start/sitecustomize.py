"""What a process of `tests.processes` imports as it starts."""

import os
import sys
from pathlib import Path

from jaxserve.config import EngineConfig
from tests.whole_programs import keeping

sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
EngineConfig.resolve = keeping(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "whole")
