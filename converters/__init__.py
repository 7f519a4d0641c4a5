"""Checkpoint formats <-> the parameter dictionaries of `jaxserve.models`.

Reads Hugging Face safetensors folders, GGUF files, our Orbax folders, and makes dummy weights.
Never reads a pickle. Knows only the model declarations of jaxserve.
"""

from converters.load import LoadedModel, LoadedTower, load
from converters.save import save
from converters.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "LoadedTower", "load", "load_tokenizer", "save"]
