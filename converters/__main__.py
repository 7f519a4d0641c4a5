"""Entry point of `python -m converters`."""

import logging
import sys

import jax

from converters.cli import main

if __name__ == "__main__":
    # Conversion needs no accelerator, and must not take one away from a running engine.
    jax.config.update("jax_platforms", "cpu")
    # Orbax reports each step of a save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.exit(main())
