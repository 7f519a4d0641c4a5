"""What an untrusted template, pattern or tokenizer may cost. Every bound has its reason here."""

from __future__ import annotations

# -- chat templates: text of a model file, run for every conversation -----------------------------

TEMPLATE_SOURCE = 1 << 17
"""Characters of a template. The longest in use have about 30,000; compiling these takes two seconds
at most."""
TEMPLATE_SCOPES = 1 << 19
"""Branches and loops of a template times the names in it: Jinja's compiler copies all names at
each. Real templates have about 30,000; this many take a second."""
TEMPLATE_SECONDS = 1.0
"""Time that the rendering of one conversation takes on its thread's own clock, so that a busy
machine changes nothing. Ordinary ones take milliseconds; 5 MB of messages take a tenth of this."""
TEMPLATE_TEXT = 1 << 24
"""Characters of one text: what a template returns, and any string on the way. A context of a
million tokens is about a third of it."""
TEMPLATE_WEIGHT = 1 << 24
"""Characters that a nested value could be written with (`costs.weight`)."""
TEMPLATE_MADE = 1 << 29
"""Bytes of all values that one rendering makes, those forgotten again included. Templates that add
each message to a text made before copy that text as often as there are messages."""
TEMPLATE_WIDTH = 1 << 16
"""Columns, digits or items that a template asks for with a number (`center`, `%9d`, `batch`)."""
TEMPLATE_ITEMS = 1 << 20
"""Items that a text is cut into: an item takes 60 bytes or more."""
TEMPLATE_PRODUCT = 1 << 28
"""Characters times characters of searches that compare each with each; a tenth of a second."""
TEMPLATE_SLOW_TEXT = 1 << 16
"""Characters given to filters that are slow in Python or quadratic (`urlize`, `striptags`)."""
TEMPLATE_BITS = 1 << 14
"""Bits of a whole number. Python writes no number of more than 4,300 digits anyway."""
TEMPLATE_DEPTH = 128
"""Values within values."""

# -- stop patterns: text of a request -------------------------------------------------------------

PATTERN_LENGTH = 4096
"""Characters of a pattern. Compiling takes time in proportion; these take about 50 ms."""
PATTERN_SIZE = 1 << 17
"""Places of a pattern, repetitions written out: `(a{1000}){1000}` has a million. The matcher takes
half a microsecond and 250 bytes for each."""
PATTERN_RUN = 512
"""Plain characters in a row. The matcher's search tables take cubic time for such a word if its
letters are all the same: 60 ms."""
PATTERN_SECONDS = 0.5
"""Time of one search. The engine thread waits for it, so all requests do; ordinary patterns search
their window of a few thousand characters in microseconds."""
PATTERN_TOTAL_SECONDS = 2.0
"""Time of all searches of one request that took longer than PATTERN_PATIENCE each."""
PATTERN_PATIENCE = 0.005
"""Seconds; a search that takes less costs its request nothing of PATTERN_TOTAL_SECONDS."""
