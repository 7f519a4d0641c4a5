"""The documentation says what the code does: tables, keys, messages and examples."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import jaxserve
import jaxserve.batch
from docs import generate
from jaxserve import errors, sglang_alias
from jaxserve.api.arguments import Arguments, GenerateOptions
from jaxserve.api.unsupported import UnsupportedMethods
from jaxserve.batch.job import RESULTS
from jaxserve.config import States
from tests.marks import long
from tests.prompts import SMALL

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {"docs/gguf.md"}
"""Of other projects, where a comment says so."""


def page(name):
    """A page as mkdocs sees it, with its tables."""
    return generate.on_page_markdown((DOCS / name).read_text(encoding="utf-8"))


def first_column(text):
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


# -- tables ----------------------------------------------------------------------------------------


def test_every_option_is_on_the_page_that_says_what_becomes_of_it():
    implemented = page("api/options.md")
    ignored, unsupported = map(
        first_column, page("api/sglang_options.md").split("\n## Not supported yet\n")
    )
    aliases = re.findall(r"also spelled `(\w+)`", implemented)
    listed = [*first_column(implemented), *aliases, *ignored, *unsupported]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(jaxserve.ServerArgs))
    for name in ignored:
        with pytest.warns(UserWarning, match=f"no meaning in jaxserve: {name}$"):
            jaxserve.ServerArgs("m", **{name: "another"})
    for name in unsupported:
        with pytest.raises(jaxserve.NotSupportedError, match=f"^{name}="):
            jaxserve.ServerArgs("m", **{name: "another"})


def test_defaults_are_those_of_an_object_without_options(monkeypatch):
    monkeypatch.delenv("SGLANG_RETURN_ORIGINAL_LOGPROB", raising=False)
    args = jaxserve.ServerArgs("m")
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page("api/options.md"), re.MULTILINE))
    assert len(shown) > 50
    assert shown == {name: repr(getattr(args, name)) for name in shown}


def test_every_sampling_parameter_and_argument_is_described():
    shown = page("api/sampling_params.md")
    assert first_column(shown) == [*jaxserve.SamplingParams.__dataclass_fields__]
    assert not re.search(r"\|\s*\|$", shown, re.MULTILINE)
    arguments = page("api/arguments.md")
    for name in GenerateOptions.__annotations__:
        assert f"`{name}`" in arguments
    refused = arguments.split("Not supported yet")[1].split("\n\n")[1]
    for name in re.findall(r"`(\w+)`", refused):
        with pytest.raises(jaxserve.NotSupportedError, match=name):
            Arguments.collect({}, **{name: "given"})


def test_every_option_of_a_batch_job_is_described():
    keyword = inspect.Parameter.KEYWORD_ONLY
    arguments = inspect.signature(jaxserve.batch.run).parameters.values()
    options = {argument.name for argument in arguments if argument.kind is keyword}
    columns, listed = page("guide/batch_jobs.md").split("## Options of a job")
    assert options - {"server_args"} == set(first_column(listed))
    assert set(RESULTS) <= set(re.findall(r"`(\w+)`", columns.split("## The output")[1]))


def test_every_method_that_is_refused_is_listed():
    listed = first_column(page("api.md").split("## Not supported yet")[1])
    assert set(listed) == {name for name in vars(UnsupportedMethods) if not name.startswith("_")}


def error_classes():
    return {
        name: cls
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.JaxserveError)
    }


@pytest.mark.parametrize("name", ["api/errors.md", "troubleshooting.md"])
def test_every_error_is_listed_with_the_builtin_that_it_is(name):
    listed = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", page(name), re.MULTILINE))
    classes = error_classes()
    assert listed.keys() | {"JaxserveError"} == classes.keys()
    for error, builtin in listed.items():
        assert issubclass(classes[error], getattr(builtins, builtin))


def test_a_mark_without_a_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        generate.on_page_markdown("<!-- table: nothing -->")
    used = [name for path in DOCS.rglob("*.md") for name in generate.MARK.findall(path.read_text())]
    assert sorted(used) == sorted(generate.TABLES)


# -- what messages say -----------------------------------------------------------------------------


def messages():
    """Every text in the code, with "..." for what is put into it."""
    found = set()
    for package in ("jaxserve", "converters", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.add("".join(map(_shown, node.values)))
    return found


def _shown(part):
    return str(part.value) if isinstance(part, ast.Constant) else "..."


def test_the_messages_that_are_explained_are_those_of_the_code():
    known = [re.sub(r"%\w", "...", message) for message in messages()]
    explained = re.findall(r"^### `(.+)`$", page("troubleshooting.md"), re.MULTILINE)
    assert len(explained) > 30
    for heading in explained:
        pattern = re.compile(".*".join(map(re.escape, heading.split("..."))), re.DOTALL)
        assert any(pattern.search(message) for message in known), heading


# -- keys of results -------------------------------------------------------------------------------


def test_every_key_of_a_result_is_described(tiny_models):
    described = set(re.findall(r"`(\w+)`", page("api/results.md")))
    options = {**SMALL, "skip_tokenizer_init": False, "max_total_tokens": 4096}
    options |= {"enable_metrics": True}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        result = engine.generate(
            ["Hello"],
            {"max_new_tokens": 2, "n": 2},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=1,
            token_ids_logprob=[1],
            return_prompt_token_ids=True,
        )[0]
        info, model = engine.get_server_info(), engine.get_model_info()
        option_names = vars(engine.server_args).keys()
    assert result.keys() - described == set()
    assert result["meta_info"].keys() - described == set()
    assert {*States("full", (0,), logits=True).names} - described == set()
    assert info.keys() - option_names - described == set()
    assert info["internal_states"][0].keys() - described == set()
    assert model.keys() - described == {"reasoning_parser", "tool_call_parser"}


# -- fields ----------------------------------------------------------------------------------------

DESCRIBED = [
    path
    for place in (
        *("api", "batch", "cache", "config", "grammars", "models", "options", "sampler"),
        *("scheduler", "text"),
    )
    for path in (ROOT / "jaxserve" / place).glob("*.py")
] + [*(ROOT / "converters").glob("*.py")]
ELSEWHERE_DESCRIBED = {"Arguments"}
"""Fields of other classes, under the same names."""


def is_record(definition):
    written = [*definition.bases, *definition.decorator_list]
    return any(re.search("NamedTuple|dataclass", ast.unparse(node)) for node in written)


TABLES = ("table.py", "decoding.py", "media.py")


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_field_of_a_record_says_what_it_is(path):
    """In a string below it, which editors show and `generate.field_docs` reads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef) or not is_record(node):
            continue
        if node.name in ELSEWHERE_DESCRIBED or node.name.startswith("_"):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                name = field.target.id
                # Options say it in the field itself.
                option = path.parent.name == "options" and path.name in TABLES
                assert text or option or name.startswith("_"), f"{path}: {node.name}.{name}"


# -- references ------------------------------------------------------------------------------------


def texts():
    """The files that may name pages."""
    for place in ("jaxserve", "converters", "pallas_kernels", "tests", "examples", "docs"):
        yield from (ROOT / place).rglob("*.py")
        yield from (ROOT / place).rglob("*.md")
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml"))


def test_pages_that_are_named_are_there():
    for path in texts():
        if path == Path(__file__):
            continue
        for name in re.findall(r"[\w./-]+\.md\b", path.read_text(encoding="utf-8")):
            places = (ROOT / name, path.parent / name, DOCS / name, ROOT / "benchmarks" / name)
            assert name in ELSEWHERE or any(map(Path.is_file, places)), f"{path} names {name}"


def test_links_of_the_pages_that_mkdocs_does_not_see():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path} links to {link}"


def test_the_gallery_shows_every_example():
    shown = set(
        re.findall(r"^\| \[([\w.]+)\]", (ROOT / "examples" / "README.md").read_text(), re.M)
    )
    there = {p.name for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".ipynb")}
    assert shown == there


# -- examples --------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if BLOCK.search(path.read_text(encoding="utf-8"))
]


SEEING = ("images",)
"""Pages whose model takes images."""
OFTEN = ("README", "quickstart", "sampling", "observability")
"""Pages whose examples run after every change."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path if path.stem in OFTEN else long(path) for path in PAGES],
    ids=lambda path: path.stem,
)
def test_the_examples_of_a_page_run_in_their_order(path, request, tmp_path, monkeypatch):
    if path.stem in SEEING:
        model = request.getfixturevalue("speaking_model")
    else:
        model = request.getfixturevalue("tiny_models")("llama")
    run_page(path, model, tmp_path, monkeypatch)


def run_page(path, model, folder, monkeypatch):
    """A page's examples as one program, on `model` in place of "path/to/model", in `folder`.
    Engines that a page leaves to the end of the program are shut down."""
    monkeypatch.chdir(folder)
    text = path.read_text(encoding="utf-8")
    program = {"__name__": "__main__"}
    try:
        for block in BLOCK.finditer(text):
            above = "\n" * text[: block.start(1)].count("\n")  # tracebacks name the page's lines
            code = above + block[1].replace('"path/to/model"', repr(model))
            exec(compile(code, str(path), "exec"), program)
    finally:
        for value in program.values():
            if isinstance(value, jaxserve.Engine):
                value.shutdown()
        sglang_alias.uninstall()


def test_the_guides_have_examples():
    guides = {*(DOCS / "guide").glob("*.md"), DOCS / "quickstart.md", DOCS / "converters.md"}
    assert guides <= set(PAGES)
