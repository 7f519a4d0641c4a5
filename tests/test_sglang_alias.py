"""jaxserve under the name sglang, in processes of their own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from packaging.specifiers import SpecifierSet

import jaxserve
from jaxserve import sglang_alias
from jaxserve.errors import NotSupportedError
from tests import processes

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sglang_alias.FOLDER)
ALIAS = [sys.executable, "-W", "error", "-m", "jaxserve.sglang_alias", "-W", "error"]


def run(*arguments, **environment):
    """What is printed. The checkout is on the path, as an installed jaxserve would be."""
    environment = processes.environment(**environment)
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return path


NAMES = """
import importlib.metadata, importlib.util, json, sys
import sglang
import sglang as sgl
from sglang import Engine, ServerArgs
from sglang.srt.entrypoints.engine import Engine as engine
from sglang.srt.hf_transformers_utils import get_tokenizer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs as server_args
from sglang.utils import (
    async_stream_and_merge, print_highlight, stream_and_merge, terminate_process, trim_overlap
)
from sglang.version import __version__

assert Engine is engine is sgl.Engine and ServerArgs is server_args
assert sglang.utils.trim_overlap is trim_overlap
try:
    from sglang import gen
except ImportError:
    pass
else:
    raise AssertionError("there is no frontend language")
print(json.dumps({
    "versions": [importlib.metadata.version("sglang"), sglang.__version__, __version__],
    "summary": importlib.metadata.distribution("sglang").metadata["Summary"],
    "packages": importlib.metadata.packages_distributions()["sglang"],
    "origin": importlib.util.find_spec("sglang").origin,
    "homes": [kind.__module__ for kind in (*Engine.__mro__[:2], ServerArgs, SamplingParams)],
    "arguments": sys.argv[1:],
}))
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = script(tmp_path_factory.mktemp("names"), NAMES)
    return json.loads(run(*ALIAS, path, "--flag", "a b"))


def test_the_names_that_clients_import_are_ours(names):
    homes = ["sglang_alias.engine", "engine", "server_args", "sampling_params"]
    assert names["homes"] == [f"jaxserve.{home}" for home in homes]
    assert names["arguments"] == ["--flag", "a b"]


def test_questions_about_the_package_are_answered(names):
    assert names["versions"] == [sglang_alias.VERSION] * 3
    assert sglang_alias.VERSION in SpecifierSet(">=0.5.10,<0.6")
    assert names["packages"] == ["sglang"]
    assert names["origin"] == str(SITE / "sglang" / "__init__.py")
    assert "jaxserve" in names["summary"]


GENERATE = """
import multiprocessing, subprocess, sys
import sglang as sgl

def child(model):
    import sglang
    print("child", sglang.__version__, flush=True)

if __name__ == "__main__":
    model = sys.argv[1]
    engine = sgl.Engine(model_path=model, device=sys.argv[2], max_total_tokens=1024)
    print(engine.generate("The capital", {"temperature": 0, "max_new_tokens": 4})["output_ids"])
    print(engine.server_args.device, flush=True)
    engine.shutdown()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=child, args=(model,))
    process.start()
    process.join()
    subprocess.run([sys.executable, "-c", "import sglang; print('subprocess', sglang.__version__)"])
"""


def test_a_script_generates_and_its_processes_see_the_alias(tiny_models, tmp_path):
    """device="cuda:0" is CUDA where there is one, else the CPU with a warning."""
    model = tiny_models("llama")
    command = [part for part in ALIAS if part not in ("-W", "error")]
    command = [*command, "-W", "ignore:JAX has no cuda device here:UserWarning"]
    printed = run(*command, script(tmp_path, GENERATE), model, "cuda:0").splitlines()
    with jaxserve.Engine(model_path=model, max_total_tokens=1024) as engine:
        params = {"temperature": 0, "max_new_tokens": 4}
        assert printed[0] == str(engine.generate("The capital", params)["output_ids"])
    assert printed[1] == "cuda,cpu"
    assert printed[2:] == [f"{how} {sglang_alias.VERSION}" for how in ("child", "subprocess")]


def test_a_server_args_object_keeps_what_its_owner_wrote(tiny_models):
    """device="cuda" in it is read the same way, in the engine's own copy."""
    from jaxserve.sglang_alias.engine import Engine

    args = jaxserve.ServerArgs(tiny_models("llama"), device="cuda", max_total_tokens=1024)
    cpu = jax.default_backend() == "cpu"
    with pytest.warns(UserWarning, match="no cuda") if cpu else contextlib.nullcontext():
        engine = Engine(server_args=args)
    with engine:
        assert (engine.server_args.device, args.device) == ("cuda,cpu", "cuda")


def test_modules_run_too_and_the_exit_status_is_theirs(tmp_path):
    (tmp_path / "client.py").write_text("import sglang, sys; sys.exit(7)")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*ALIAS, "-m", "client"], env=environment, timeout=60)
    assert done.returncode == 7


def test_the_folder_alone_does_it():
    folder = run(sys.executable, "-m", "jaxserve.sglang_alias", "--path").strip()
    path = os.pathsep.join([folder, str(ROOT)])
    program = "import sglang; print(sglang.__version__)"
    assert run(sys.executable, "-c", program, PYTHONPATH=path).strip() == sglang_alias.VERSION


def test_install_and_uninstall(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    sglang_alias.install()
    sglang_alias.install()
    try:
        import sglang

        assert sglang.__version__ == importlib.metadata.version("sglang") == sglang_alias.VERSION
        assert os.environ["PYTHONPATH"] == os.pathsep.join([sglang_alias.FOLDER, "elsewhere"])
    finally:
        sglang_alias.uninstall()
    assert os.environ["PYTHONPATH"] == "elsewhere"
    assert sglang_alias.FOLDER not in sys.path and "sglang" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("sglang")


def test_another_sglang_that_is_imported_already_is_refused(monkeypatch):
    other = type(sys)("sglang")
    other.__file__ = "/packages/sglang/__init__.py"
    monkeypatch.setitem(sys.modules, "sglang", other)
    with pytest.raises(NotSupportedError, match="already imported, from /packages/sglang"):
        sglang_alias.install()
    assert sglang_alias.FOLDER not in sys.path


def test_the_metadata_names_the_version():
    [folder] = SITE.glob("*.dist-info")
    assert folder.name == f"sglang-{sglang_alias.VERSION}.dist-info"
    assert f"Version: {sglang_alias.VERSION}\n" in (folder / "METADATA").read_text()
