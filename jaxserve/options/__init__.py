"""The constructor options: a table of jaxserve's own, and one of SGLang's."""

from jaxserve.options.docs import DocsRow, docs_rows
from jaxserve.options.option import Option
from jaxserve.options.table import ALIASES, OPTIONS, Options
from jaxserve.options.upstream import FOREIGN, UPSTREAM, UpstreamOption

__all__ = [
    "ALIASES",
    "FOREIGN",
    "OPTIONS",
    "UPSTREAM",
    "DocsRow",
    "Option",
    "Options",
    "UpstreamOption",
    "docs_rows",
]
