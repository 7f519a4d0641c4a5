"""Who may import whom (docs/architecture.md), read off the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_JAX = [
    "jaxserve/__init__.py", "jaxserve/errors.py", "jaxserve/request.py", "jaxserve/inbox.py",
    "jaxserve/core.py", "jaxserve/reception.py", "jaxserve/leftovers.py",
    "jaxserve/replicas/__init__.py", "jaxserve/replicas/prefixes.py",
    "jaxserve/replicas/replica.py", "jaxserve/replicas/replicas.py",
    "jaxserve/replicas/router.py", "jaxserve/replicas/totals.py", "jaxserve/process.py",
    "jaxserve/folders.py", "jaxserve/token_ids.py", "jaxserve/step/notice.py",
    "jaxserve/lab/pages.py", "jaxserve/sampling_params.py",
    "jaxserve/server_args.py", "jaxserve/options", "jaxserve/machine.py", "jaxserve/config",
    "jaxserve/checks.py", "jaxserve/shown.py", "jaxserve/scheduler", "jaxserve/cache/pages.py",
    "jaxserve/cache/radix.py", "jaxserve/cache/prefix.py", "jaxserve/cache/window.py",
    "jaxserve/cache/keys.py", "jaxserve/cache/host.py", "jaxserve/packing",
    "jaxserve/sampler/fields.py", "jaxserve/text", "jaxserve/output",
    "jaxserve/batch", "jaxserve/grammars", "jaxserve/media", "jaxserve/automata",
]  # fmt: skip


def files(*places: str) -> list[Path]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, conditional type imports excluded."""
    names: set[str] = set()
    skipped: set[ast.AST] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_host_side_imports_no_jax_anywhere_on_its_way():
    program = (
        "import sys, jaxserve, jaxserve.request, jaxserve.scheduler.scheduler,"
        "jaxserve.packing.pack,"
        "jaxserve.output.commit, jaxserve.text.stop, jaxserve.server_args, jaxserve.inbox;"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_start_imports_no_kernels():
    """Half a second that a start from stored programs need not take."""
    program = (
        "import sys, converters, jaxserve.loop;"
        "assert not {'jax.experimental.pallas', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", files(*NO_JAX), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_jax(path):
    assert not roots(path) & {"jax", "jaxlib", "flax", "torch"}


@pytest.mark.parametrize("path", files("pallas_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_the_engine(path):
    assert not roots(path) & {"jaxserve", "converters", "torch"}


@pytest.mark.parametrize("path", files("converters"), ids=lambda p: str(p.relative_to(ROOT)))
def test_converters_know_only_model_declarations(path):
    ours = {name for name in imports(path) if name.startswith(("jaxserve", "pallas_kernels"))}
    allowed = ("jaxserve.models", "jaxserve.errors", "jaxserve.memory", "jaxserve.shown")
    assert all(name == "jaxserve" or name.startswith(allowed) for name in ours), ours
    assert "torch" not in roots(path)


@pytest.mark.parametrize("path", files("jaxserve/models"), ids=lambda p: str(p.relative_to(ROOT)))
def test_models_are_only_mathematics(path):
    ours = {name for name in imports(path) if name.startswith("jaxserve.")}
    known = ("jaxserve.models", "jaxserve.errors", "jaxserve.shown", "jaxserve.media.picture")
    assert all(name.startswith(known) for name in ours), ours
    assert not roots(path) & {"converters", "pallas_kernels"}


def test_options_are_on_the_ground_floor():
    """Beside them, only what knows of no option."""
    allowed = ("jaxserve.options", "jaxserve.checks", "jaxserve.errors", "jaxserve.sampling_params")
    for path in files("jaxserve/options"):
        ours = {name for name in imports(path) if name.startswith("jaxserve.")}
        assert all(name.startswith(allowed) for name in ours), (path, ours)


@pytest.mark.parametrize("path", files("jaxserve/parallel"), ids=lambda p: p.name)
def test_meshes_know_nothing_of_the_engine(path):
    allowed = ("jaxserve.parallel", "jaxserve.errors", "jaxserve.checks")
    ours = {name for name in imports(path) if name.startswith("jaxserve.")}
    assert all(name.startswith(allowed) for name in ours), ours


def test_machines_know_nothing_of_the_engine():
    assert not {name for name in imports(ROOT / "jaxserve/machine.py") if "jaxserve" in name}


def test_only_the_step_compiles():
    """`jit`, `lower` and `compile` of JAX programs stay in step/ (kernels compile within them).
    Algorithms over a laboratory are on the user's side."""
    for path in files("jaxserve"):
        if path.parent.name in ("step", "decoding"):
            continue
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not calls & {"jax.jit", "nnx.jit"}, path


def test_only_compat_asks_for_the_version():
    for path in files("jaxserve", "converters"):
        if path.name != "compat.py" and "site" not in path.parts:  # the alias answers with it
            assert "__version__" not in path.read_text() or path.name == "__init__.py", path


def test_no_file_outgrows_an_afternoon():
    """None over 350 lines outside kernels and tests."""
    for path in files("jaxserve", "converters", "benchmarks", "examples"):
        assert len(path.read_text().splitlines()) <= 350, path


def test_no_circles_of_imports():
    """Neither of files nor of packages of jaxserve: imports within functions count."""
    paths = files("jaxserve", "converters", "pallas_kernels", "benchmarks")
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
        if "site" not in path.parts
    }
    of_files = {name: used(path, names) - {name} for name, path in names.items()}
    assert sorted_out(of_files) == []
    packages: dict[str, set[str]] = {}
    for name, modules in of_files.items():
        if name.startswith("jaxserve."):
            others = {package(x) for x in modules if x.startswith("jaxserve.")} - {package(name)}
            packages.setdefault(package(name), set()).update(others)
    assert sorted_out(packages) == []


def used(path: Path, names: Iterable[str]) -> set[str]:
    """The modules among `names` that a file imports; of `from package import module` the module."""
    found = imports(path) & set(names)
    return {name for name in found if not any(x.startswith(f"{name}.") for x in found)}


def package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def sorted_out(graph: dict[str, set[str]]) -> list[str]:
    """What is left when everything is taken away, again and again, that uses nothing left: the
    members of circles and whatever uses them."""
    left = dict(graph)
    while free := [name for name, modules in left.items() if not modules & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)
