"""start_profile and stop_profile: what the trace holds, when it ends, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import jax
import pytest

import jaxserve
from jaxserve.api.profile import FOLDER_VARIABLE
from jaxserve.errors import InvalidRequestError, JaxserveError, NotSupportedError, ProfileError

OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 8,
    "cuda_graph_bs": [1, 8], "chunked_prefill_size": 128, "max_total_tokens": 1024,
}  # fmt: skip
PROMPT = [5, 6, 7, 8]
PHASES = ("schedule", "prepare", "dispatch", "wait", "commit")


def generate(engine, new):
    params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    return engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]


@pytest.fixture(scope="module")
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        generate(engine, 4)
        yield engine


def traces(folder):
    return sorted(Path(folder).glob("plugins/profile/*"))


def events(folder):
    """Names of all events of the only trace under `folder`."""
    (trace,) = traces(folder)
    (path,) = trace.glob("*.trace.json.gz")
    assert list(trace.glob("*.xplane.pb"))
    with gzip.open(path) as file:
        return [event.get("name") for event in json.load(file)["traceEvents"]]


def test_a_trace_names_the_phases_of_the_loop(engine, tmp_path):
    expected = generate(engine, 10)
    folder = engine.start_profile(str(tmp_path / "new" / "folder"))
    assert folder == str(tmp_path / "new" / "folder")
    assert generate(engine, 10) == expected
    assert engine.stop_profile() is None
    names = events(folder)
    for phase in PHASES:
        # a prefill and nine decode steps
        assert names.count(phase) >= 10, phase
    assert generate(engine, 10) == expected


def test_it_stops_by_itself_after_num_steps(engine, tmp_path):
    engine.start_profile(tmp_path, num_steps=5)
    generate(engine, 30)
    with pytest.raises(ProfileError, match="no profile is running"):
        engine.stop_profile()
    names = events(tmp_path)
    assert names.count("commit") == 5 and names.count("dispatch") in (5, 6)


def test_it_begins_at_start_step(engine, tmp_path):
    info = engine.get_server_info()
    now = info["extend_steps"] + info["decode_steps"]
    engine.start_profile(tmp_path / "a", start_step=now + 20, num_steps=3)
    generate(engine, 15)
    assert not traces(tmp_path / "a")
    generate(engine, 15)
    assert events(tmp_path / "a").count("commit") == 3
    engine.start_profile(tmp_path / "b", start_step=now + 10_000)
    generate(engine, 3)
    engine.stop_profile()
    assert not traces(tmp_path / "b")
    engine.start_profile(tmp_path / "c", start_step=0)
    generate(engine, 3)
    engine.stop_profile()
    assert events(tmp_path / "c").count("commit") >= 3


def test_a_second_profile_is_refused(engine, tmp_path, tiny_models):
    engine.start_profile(tmp_path / "a")
    with pytest.raises(ProfileError, match=r"running already, into .*a") as caught:
        engine.start_profile(tmp_path / "b")
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, JaxserveError)
    with (
        jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as other,
        pytest.raises(ProfileError, match="JAX's profiler does not start"),
    ):
        other.start_profile(tmp_path / "c")
    engine.stop_profile()
    with pytest.raises(ProfileError, match="no profile is running"):
        engine.stop_profile()
    assert len(traces(tmp_path / "a")) == 1 and not traces(tmp_path / "b")


def test_a_start_that_fails_later_does_not_harm_the_engine(engine, tmp_path, caplog):
    """Somebody else traces when start_step comes."""
    info = engine.get_server_info()
    first = info["extend_steps"] + info["decode_steps"] + 3
    engine.start_profile(tmp_path / "a", start_step=first)
    with jax.profiler.trace(str(tmp_path / "other")):
        assert len(generate(engine, 20)) == 20
    assert "JAX's profiler does not start" in caplog.text
    with pytest.raises(ProfileError, match="no profile"):
        engine.stop_profile()
    engine.start_profile(tmp_path / "b")
    engine.stop_profile()
    assert len(traces(tmp_path / "b")) == 1


def test_shutdown_ends_it(tiny_models, tmp_path):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    engine.start_profile(tmp_path)
    generate(engine, 5)
    engine.shutdown()
    assert events(tmp_path).count("commit") >= 5
    with jax.profiler.trace(str(tmp_path / "next")):
        pass
    with pytest.raises(jaxserve.EngineShutdownError):
        engine.start_profile(tmp_path)


def test_what_is_traced(engine, tmp_path):
    engine.start_profile(tmp_path / "a", activities=["GPU"], record_shapes=False)
    generate(engine, 3)
    engine.stop_profile()
    assert "commit" not in events(tmp_path / "a")
    engine.start_profile(tmp_path / "b", activities=["CPU"], with_stack=True)
    generate(engine, 3)
    engine.stop_profile()
    assert any("inbox.py" in str(name) for name in events(tmp_path / "b"))


def test_where_it_goes(engine, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "by-variable"))
    assert engine.start_profile(profile_id="one") == str(tmp_path / "by-variable")
    engine.stop_profile()
    assert engine.start_profile(profile_id="two", profile_prefix="decode")
    engine.stop_profile()
    assert [trace.name for trace in traces(tmp_path / "by-variable")] == ["decode-two", "one"]
    with pytest.raises(InvalidRequestError, match="has a profile 'one' already"):
        engine.start_profile(profile_id="one")
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = set()
    for _ in range(2):
        folder = engine.start_profile()
        engine.stop_profile()
        assert os.path.dirname(folder) == str(tmp_path) and len(traces(folder)) == 1
        folders.add(folder)
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 1.5),
        ("start_step", -1),
        ("activities", ["TPU"]),
        ("activities", []),
        ("activities", 3),
        ("with_stack", "yes"),
        ("record_shapes", 1),
        ("profile_id", "a/b"),
        ("profile_id", ""),
        ("profile_prefix", 7),
        ("output_dir", 5),
    ],
)
def test_bad_arguments_name_themselves(engine, tmp_path, name, value):
    arguments = {"output_dir": tmp_path, name: value}
    with pytest.raises(InvalidRequestError, match=name) as caught:
        engine.start_profile(**arguments)
    assert str(value[0] if isinstance(value, list) and value else value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activities", ["CPU", "MEM"]),
        ("profile_by_stage", True),
        ("profile_stages", ["decode"]),
        ("merge_profiles", True),
    ],
)
def test_what_jax_has_not(engine, tmp_path, name, value):
    with pytest.raises(NotSupportedError, match=name):
        engine.start_profile(tmp_path, **{name: value})


def test_a_folder_that_cannot_be_written(engine, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidRequestError, match=r"output_dir=.*file.* cannot be written to"):
        engine.start_profile(tmp_path / "file" / "folder")
    with pytest.raises(TypeError, match="nonsense"):
        engine.start_profile(tmp_path, nonsense=1)
