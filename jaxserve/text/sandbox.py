"""Jinja's sandbox with a budget: templates that end, whatever they say.

The code that Jinja makes of a template asks its environment for calls, attributes and filters, and
here also for operators, comparisons, loops and texts. Each question is answered after `costs` has
looked at it; `Budget` reads the clock in between.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxserve.text import costs
from jaxserve.text.costs import Budget, TooCostly

OPERATORS = frozenset(("+", "-", "*", "/", "//", "**", "%"))
COMPARING = frozenset(
    (
        "eq",
        "equalto",
        "==",
        "ne",
        "!=",
        "gt",
        "greaterthan",
        ">",
        "ge",
        ">=",
        "lt",
        "lessthan",
        "<",
        "le",
        "<=",
        "in",
    )
)


class BoundedCode(CodeGenerator):
    """Python code of a template that asks the environment where Jinja's own code does not."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        asked = nodes.EnvironmentAttribute("counted")
        node.iter = nodes.Call(asked, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write("(markup_join if context.eval_ctx.volatile else str_join)")
        else:
            self.write("markup_join" if frame.eval_ctx.autoescape else "str_join")
        self.write("(environment.texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(environment.compared(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        inside = node.op in ("in", "notin")
        self.write(f" {operators[node.op]} environment.{'container' if inside else 'compared'}(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("{")
        for pair in node.items:
            self.write("environment.compared(")
            self.visit(pair.key, frame)
            self.write("): ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's words for training and renders as they are
    (transformers, utils/chat_template_utils.py)."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("spoken"), [], [], body).set_lineno(line)

    def spoken(self, caller: Callable[[], str]) -> str:
        return caller()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering. Raises TooCostly (a jinja2.TemplateError) over its budget.

    Filters, globals and white space are those of transformers' `apply_chat_template`. `lipsum` is
    not there.
    """

    code_generator_class = BoundedCode
    intercepted_binops = OPERATORS

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be computed while compiling, without a budget
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=_finalize,
            cache_size=0,
        )
        self.budget = Budget()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items()}
        self.tests = {
            name: self._comparing(test) if name in COMPARING else test
            for name, test in self.tests.items()
        }
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
        }

    # -- what the code of a template asks ---------------------------------------------------------

    def concat(self, parts: Iterable[str]) -> str:
        """The parts of a macro's, a block's or the template's text as one."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            costs.within("the length of the text", size, costs.limits.TEMPLATE_TEXT)
            self.budget.spend()
            kept.append(part)
        return self.budget.made("".join(kept))

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """What a `for` goes through."""
        return self.budget.counted(items)

    def texts(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands of `~`, which are written one after the other."""
        size = self.budget.deep(*parts)
        costs.within("the length of a text", size, costs.limits.TEMPLATE_WEIGHT)
        self.budget.made(None)
        return parts

    def compared(self, value: Any) -> Any:
        """An operand of a comparison, or a key, which is hashed."""
        if value is None or isinstance(value, bool | int | float | jinja2.Undefined):
            self.budget.spend()
        else:
            self.budget.deep(value)
        return value

    def container(self, value: Any) -> Any:
        """What `in` looks into: of a dict, its keys by hash."""
        return value if isinstance(value, dict) else self.compared(value)

    def sliced(self, value: Any) -> Any:
        """What a slice is cut from, the size of which it has at most."""
        return self.budget.made(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        costs.check_operator(operator, left, right)
        if operator == "%":
            self.budget.deep(left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.compared(argument)  # a tuple's hash looks at all of it
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text = str(value.__self__)

        @functools.wraps(inner)
        def bounded(*args: Any, **named: Any) -> str:
            costs.check_format(text, args, named)
            return inner(*args, **named)

        return bounded

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        # Named so that a template's keywords `self` and `context` reach what it calls.
        budget, subject = __self.budget, getattr(__obj, "__self__", None)
        budget.spend()
        if isinstance(subject, str | bytes | int | float | dict | list | tuple):
            name = __obj.__name__
            args = tuple(map(__self._settled, args))
            costs.check_call(name, subject, args, named)
            if name not in costs.SHALLOW:
                budget.deep(subject)
        if not isinstance(__obj, Macro) and __obj is not TemplateNamespace:
            budget.deep(args, named)  # others may compare or hash what they are given
        result = super().call(__context, __obj, *args, **named)
        return result if subject is __self else budget.made(result)

    # -- filters and tests ------------------------------------------------------------------------

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **named: Any) -> Any:
            budget = self.budget
            if name not in costs.SHALLOW:
                args = (*args[:first], *map(self._settled, args[first:]))
                budget.deep(args[first:], named)
            subject = args[first] if len(args) > first else None
            if name == "format":
                costs.check_percent_filter(subject, list(args[first + 1 :]), named)
            costs.check_call(name, subject, args[first + 1 :], named)
            result = function(*args, **named)
            return budget.counted(result) if isinstance(result, Iterator) else budget.made(result)

        return bounded

    def _comparing(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def bounded(*values: Any) -> Any:
            return test(*map(self.compared, values))

        return bounded

    def _settled(self, value: Any) -> Any:
        """Iterators as lists: what is to be weighed is looked at twice."""
        return self.budget.made(list(value)) if isinstance(value, Iterator) else value


class TemplateDict:
    """`dict` of a template, a function rather than a class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace` of a template; names that begin with an underscore are refused."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *given = args
        attributes = dict(*given, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it may hold itself


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name[:80]!r}")


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    """What `{{ ... }}` writes. (A function of the context is not called while compiling.)"""
    if not isinstance(value, str):
        context.environment.budget.deep(value)
    return value


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:2000])


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: HTML's marks and other alphabets stay as they are."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    if not isinstance(format, str) or len(format) > 1000:
        raise TooCostly("strftime_now takes a format of at most 1000 characters")
    return datetime.now().strftime(format)
