"""Decoding algorithms over a laboratory (`Engine.lab`): see docs/guide/lab.md."""

from __future__ import annotations

from jaxserve.decoding.beam import Beam, beam_search

__all__ = ["Beam", "beam_search"]
