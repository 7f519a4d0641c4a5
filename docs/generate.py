"""What of the documentation is made from the code: mkdocs calls `on_page_markdown` for each page.

A line `<!-- table: NAME -->` becomes the table of that name in TABLES, and the file that a block of
code names (```python some/file.py) its title. Only this file knows where the code keeps what the
tables show; it imports nothing that needs JAX.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from jaxserve import errors
from jaxserve.api.arguments import GenerateOptions
from jaxserve.api.unsupported import UnsupportedMethods
from jaxserve.batch.columns import Columns
from jaxserve.batch.run import JobOptions
from jaxserve.options import docs_rows
from jaxserve.sampling_params import TOP_K_ALL, SamplingParams

MARK = re.compile(r"^<!-- table: ([\w-]+) -->$", re.MULTILINE)
NAMED_BLOCK = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)
ARGUMENT_DEFAULTS = {"logprob_start_len": -1, "top_logprobs_num": 0}
"""What None means, where it means a number."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables and titles. KeyError: there is no such table."""
    markdown = NAMED_BLOCK.sub(r'```\1 title="\2"', markdown)
    return MARK.sub(lambda found: TABLES[found[1]](), markdown)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def options() -> str:
    """Every option that has a meaning here."""
    rows = (
        (
            f"`{row.name}`",
            row.default if row.default == "required" else f"`{row.default}`",
            row.meaning,
        )
        for row in docs_rows()
        if row.treatment == "implemented"
    )
    return table(("option", "default", "meaning"), rows)


def foreign(treatment: str) -> str:
    """SGLang's options that are "ignored" or "unsupported", with their newest default."""
    rows = (
        (f"`{row.name}`", f"`{row.type}`", f"`{row.default}`")
        for row in docs_rows()
        if row.treatment == treatment
    )
    return table(("option", "type", "default"), rows)


def sampling_parameters() -> str:
    """The keys of sampling_params."""
    said = field_docs(SamplingParams)
    rows = (
        (f"`{field.name}`", f"`{_sampling_default(field)!r}`", said[field.name])
        for field in dataclasses.fields(SamplingParams)
    )
    return table(("key", "default", "values and meaning"), rows)


def arguments() -> str:
    """The named arguments of `generate` that are supported."""
    said = field_docs(GenerateOptions)
    kinds = GenerateOptions.__annotations__
    rows = []
    for name, text in said.items():
        default = False if str(kinds[name]).startswith(("bool", "ForwardRef('bool")) else None
        rows.append((f"`{name}`", f"`{ARGUMENT_DEFAULTS.get(name, default)!r}`", text))
    return table(("argument", "default", "meaning"), rows)


def unsupported_arguments() -> str:
    """The named arguments that are refused."""
    said = field_docs(GenerateOptions)
    return ", ".join(f"`{name}`" for name in GenerateOptions.__annotations__ if name not in said)


def unsupported_methods() -> str:
    """SGLang's methods that are refused."""
    rows = (
        (f"`{name}`", (method.__doc__ or "").strip())
        for name, method in vars(UnsupportedMethods).items()
        if callable(method)
    )
    return table(("method", ""), rows)


def error_classes() -> str:
    """Every exception with the built-in that it also is."""
    rows = []
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.JaxserveError):
            builtin = next(base for base in cls.__mro__ if base.__module__ == "builtins")
            rows.append((f"`{name}`", f"`{builtin.__name__}`", inspect.getdoc(cls) or ""))
    return table(("exception", "is a", "when"), rows)


def batch() -> str:
    """The options of a batch job: arguments of `jaxserve.batch.run`, and flags."""
    columns = field_docs(Columns)
    names = {"sampling": "sampling_columns"}
    rows = [
        (f"`{names.get(field.name, f'{field.name}_column')}`", _default(field), columns[field.name])
        for field in dataclasses.fields(Columns)
    ]
    said = field_docs(JobOptions)
    rows += [
        (f"`{field.name}`", _default(field), said[field.name])
        for field in dataclasses.fields(JobOptions)
        if field.name != "columns"
    ]
    return table(("option", "default", "meaning"), rows)


def _default(field: dataclasses.Field[Any]) -> str:
    return "all" if field.name == "sampling" else f"`{field.default!r}`"


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class, on one line; fields without one are left out."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    said = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            said[field.target.id] = " ".join(str(below.value.value).split())
    return said


def _sampling_default(field: dataclasses.Field[Any]) -> Any:
    """As it is given: tuples and sets are the normal forms of what may be left out."""
    if field.default is dataclasses.MISSING or field.default in ((), frozenset()):
        return None
    return -1 if field.default == TOP_K_ALL else field.default


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


TABLES: dict[str, Callable[[], str]] = {
    "options": options,
    "sglang-ignored": lambda: foreign("ignored"),
    "sglang-unsupported": lambda: foreign("unsupported"),
    "sampling-parameters": sampling_parameters,
    "arguments": arguments,
    "unsupported-arguments": unsupported_arguments,
    "unsupported-methods": unsupported_methods,
    "errors": error_classes,
    "batch": batch,
}
