"""A model's chat template, compiled once and rendered in bounded time and memory."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes

from jaxserve.errors import InvalidRequestError
from jaxserve.text import limits
from jaxserve.text.costs import Budget, within
from jaxserve.text.sandbox import BoundedEnvironment

SCOPES = (
    nodes.If,
    nodes.For,
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.With,
    nodes.AssignBlock,
    nodes.Block,
    nodes.Scope,
    nodes.CondExpr,
)
SHOWN = 500
"""Characters of a template's own words in an error."""


class Template:
    """A Jinja template as transformers' `apply_chat_template` understands it.

    Any number of threads may render at a time. Raises InvalidRequestError if it is no template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > limits.TEMPLATE_SOURCE:
            raise InvalidRequestError(
                f"the chat template has {len(source)} characters; at most "
                f"{limits.TEMPLATE_SOURCE} are taken"
            )
        self.source = source
        try:
            environment = BoundedEnvironment()
            tree = environment.parse(source)
            scopes = sum(1 for _ in tree.find_all(SCOPES))
            names = {name.name for name in tree.find_all(nodes.Name)}
            within("scopes times names", scopes * len(names), limits.TEMPLATE_SCOPES)
            code = environment.compile(tree)
        except Exception as error:  # of Jinja's parser and, for odd nesting, of Python's
            raise _refused("is not usable", error) from error
        assert isinstance(code, types.CodeType)
        self._code = code
        # Environments take a millisecond to make. One renders one text at a time.
        self._free: list[jinja2.Template] = []

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. variables: plain values, see `chat.plain`. Raises InvalidRequestError with what
        the template says, or what it lacks, or which bound of `limits` it breaks."""
        try:
            template = self._free.pop()
        except IndexError:
            environment = BoundedEnvironment()
            template = jinja2.Template.from_code(
                environment, self._code, environment.make_globals(None)
            )
        environment = template.environment
        assert isinstance(environment, BoundedEnvironment)
        environment.budget = Budget()
        try:
            context = template.new_context(dict(variables))
            return environment.concat(template.root_render_func(context))
        except Exception as error:  # a template is a program: it can raise whatever Python can
            raise _refused("refuses the messages", error) from error
        finally:
            self._free.append(template)


def _refused(what: str, error: Exception) -> InvalidRequestError:
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    text = str(error)
    said = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return InvalidRequestError(f"the chat template {what}: {kind}{said}")
