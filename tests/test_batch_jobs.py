"""Batch jobs: what they write, that they go on after any crash, and whose folder is whose."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import jaxserve
import jaxserve.batch
from jaxserve.batch import jsonl, local, on_ray, parquet
from jaxserve.batch.__main__ import main
from jaxserve.batch.folder import OWN
from jaxserve.batch.tally import Report, Tally
from tests.batch_engine import EchoEngine
from tests.pictures import file_of, noise, text_of
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def echo(monkeypatch):
    """Jobs of this process have an engine that answers with what it was asked."""
    import jaxserve.engine

    monkeypatch.setattr(jaxserve.engine, "Engine", EchoEngine)
    monkeypatch.setattr(EchoEngine, "started", 0)
    return EchoEngine


def output(folder):
    """The rows of a JSONL job, in order."""
    return [
        json.loads(line)
        for path in sorted(Path(folder).glob("part-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def run(rows, folder, **more):
    options = {"model_path": "model", "runner": "local", "progress": False, "part_rows": 4}
    return jaxserve.batch.run(rows, folder, **(options | more))


ROWS = [{"prompt": f"p{number}", "id": f"r{number}"} for number in range(10)]


# -- the output ------------------------------------------------------------------------------------


def test_every_row_is_answered_once_in_order_with_its_other_columns(echo, tmp_path):
    rows = [
        {"prompt": "a", "id": 7, "note": "é\ud800"},
        {"prompt": "b", "temperature": 0.5, "note": {"x": [1, None]}},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"input_ids": [3, 4, 5]},
    ]
    report = run(rows, tmp_path / "out", sampling_params={"top_k": 3}, output_ids=True)
    answers = output(tmp_path / "out")
    common = {"finish_reason": "length", "completion_tokens": 2, "cached_tokens": 1, "error": None}
    assert answers[0] == {
        "index": 0, "id": 7, "note": "é\ud800", "text": "a|{'top_k': 3}", "output_ids": [1, 2],
        "prompt_tokens": 1, **common,
    }  # fmt: skip
    assert answers[1]["text"] == "b|{'top_k': 3, 'temperature': 0.5}"
    assert answers[1]["note"] == {"x": [1, None]} and answers[1]["temperature"] == 0.5
    assert answers[2]["text"].startswith("[{'role': 'user', 'content': 'Hi'}]|")
    assert answers[3]["text"].startswith("[3, 4, 5]|") and "input_ids" not in answers[3]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert (report.total.rows, report.total.failed, report.now) == (4, 0, report.total)
    assert report.total.prompt_tokens == sum(answer["prompt_tokens"] for answer in answers) == 6
    assert (report.total.completion_tokens, report.total.cached_tokens) == (8, 4)


def test_a_broken_row_costs_itself(echo, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "SAMPLE", 4)
    rows = [
        {"prompt": "a"},
        {"prompt": "broken", "id": 1},  # refused by the engine
        {"id": 2},  # asks nothing
        {"prompt": "b", "top_p": 7.0},
        {"prompt": "c", "index": 5},  # a name of the output's own
        {"prompt": "d"},
    ]
    report = run(rows, tmp_path / "out")
    answers = output(tmp_path / "out")
    assert [answer["text"] for answer in answers] == ["a|{}", None, None, None, None, "d|{}"]
    assert answers[1]["error"] == "InvalidRequestError: prompt is 'broken'"
    assert answers[1]["id"] == 1 and answers[1]["prompt_tokens"] is None
    assert "exactly one of" in answers[2]["error"] and "top_p" in answers[3]["error"]
    assert "column 'index'" in answers[4]["error"] and answers[4]["index"] == 4
    assert (report.total.rows, report.total.failed) == (6, 4)


def test_images_go_with_their_rows_and_a_broken_one_costs_its_own(echo, tmp_path):
    rows = [
        {"prompt": "a", "image_data": "a.png", "id": 1},
        {"prompt": "b", "image_data": ["broken.png"]},
        {"input_ids": [3, 4], "image_data": ["b.png", "c.png"]},
        {"prompt": "c"},
    ]
    run(rows, tmp_path / "out")
    answers = output(tmp_path / "out")
    texts = ["a|{}|['a.png']", None, "[3, 4]|{}|['b.png', 'c.png']", "c|{}"]
    assert [answer["text"] for answer in answers] == texts
    assert answers[1]["error"] == "InvalidRequestError: image_data[0][0] is 'broken.png'"
    assert answers[0]["id"] == 1 and not any("image_data" in answer for answer in answers)


@pytest.mark.slow
@pytest.mark.long
def test_a_model_captions_images_in_every_form(speaking_model, tmp_path, monkeypatch):
    """Paths relative to the working directory, data URLs, base64 and parts of messages."""
    monkeypatch.chdir(tmp_path)
    image = noise(40, 24)
    image.save("cat.png")
    text = text_of(file_of(image))
    prompt = "<|image_pad|>Hi"
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + text}}
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
    rendered = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    rows = [
        *({"prompt": prompt, "image_data": x} for x in ("cat.png", text, ["data:;base64," + text])),
        {"messages": talk},
        {"prompt": rendered, "image_data": "cat.png"},
        {"prompt": prompt, "image_data": "none.png"},
        {"prompt": prompt * 2, "image_data": ["cat.png", "cat.png"]},
        {"prompt": prompt, "image_data": ["cat.png", "cat.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]},
    ]
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    small = {"context_length": 256, "max_total_tokens": 512, "max_running_requests": 2}
    run(rows, "out", model_path=speaking_model, sampling_params=params, part_rows=None, **small)
    answers = output("out")
    paths, chats = answers[:3], answers[3:5]
    for same in (paths, chats):
        assert len({(answer["text"], answer["prompt_tokens"]) for answer in same}) == 1
    # 40 x 24 pixels are 5 x 3 tokens of 8 x 8
    assert paths[0]["prompt_tokens"] == 15 + 2 and paths[0]["error"] is None
    assert answers[6]["prompt_tokens"] == 2 * paths[0]["prompt_tokens"]
    failed = [answer["error"] for answer in answers if answer["error"] is not None]
    assert [answer["index"] for answer in answers if answer["error"]] == [5, 7, 8]
    assert "none.png" in failed[0] and "none.png" in failed[2]
    assert "1 image placeholders but 2 image inputs" in failed[1]


def test_names_of_the_output_can_be_others(echo, tmp_path):
    rows = [{"question": "a", "text": "mine"}]
    with pytest.raises(jaxserve.InvalidRequestError, match=r"column 'text'.*output_prefix"):
        run(rows, tmp_path / "out", prompt_column="question")
    run(rows, tmp_path / "out2", prompt_column="question", output_prefix="model_")
    [answer] = output(tmp_path / "out2")
    assert (answer["text"], answer["model_text"], answer["model_error"]) == ("mine", "a|{}", None)
    run(rows, tmp_path / "out3", prompt_column="text")
    [answer] = output(tmp_path / "out3")
    assert (answer["question"], answer["text"]) == ("a", "mine|{}")


def test_parquet_parts_have_one_schema(echo, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import dataset

    rows = [
        {"prompt": "a", "n1": None, "share": 1, "mixed": 1, "only": "é\ud800"} for _ in range(4)
    ]
    rows += [{"prompt": "b", "n1": 5, "share": 0.5, "mixed": [1], "top_k": 2} for _ in range(4)]
    rows += [{"prompt": "broken"}]
    report = run(rows, tmp_path / "out", output_format="parquet", output_ids=True)
    table = dataset.dataset(tmp_path / "out").to_table()
    assert {field.name: str(field.type) for field in table.schema} == {
        "index": "int64", "n1": "int64", "share": "double", "mixed": "string", "only": "string",
        "top_k": "int64", "text": "string", "output_ids": "list<element: int32>",
        "finish_reason": "string", "prompt_tokens": "int64", "completion_tokens": "int64",
        "cached_tokens": "int64", "error": "string",
    }  # fmt: skip
    found = sorted(table.to_pylist(), key=lambda row: row["index"])
    assert [row["mixed"] for row in found] == ["1"] * 4 + ["[1]"] * 4 + [None]
    assert found[0]["only"] == "é\ufffd\ufffd\ufffd" and found[4]["text"] == "b|{'top_k': 2}"
    assert found[8]["error"] is not None and found[8]["text"] is None
    os.remove(tmp_path / "out" / OWN / "report.json")
    again = run(rows, tmp_path / "out", output_format="parquet", output_ids=True)
    assert (again.now.rows, again.total.failed) == (0, 1)
    assert again.total.completion_tokens == report.total.completion_tokens


def test_types_of_parquet_are_carried_from_file_to_file(echo, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import dataset, parquet

    columns = {
        "prompt": ["a", "b"],
        "when": pyarrow.array([0, None], pyarrow.timestamp("us", "UTC")),
        "small": pyarrow.array([1, 2], pyarrow.int8()),
        "raw": [b"\xff", None],
        "tags": pyarrow.array([["x"], None], pyarrow.list_(pyarrow.string())),
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "in.parquet")
    path = str(tmp_path / "in.parquet")
    run(path, tmp_path / "out", output_format="parquet")
    found = dataset.dataset(tmp_path / "out").to_table()
    for name in ("when", "small", "raw", "tags"):
        assert found.schema.field(name).type == table.schema.field(name).type
        assert found[name].to_pylist() == table[name].to_pylist()
    run(path, tmp_path / "json")
    first, second = output(tmp_path / "json")
    assert first["when"].startswith("1970-01-01") and first["raw"] == "/w=="
    assert second["small"] == 2 and "raw" not in second


# -- going on --------------------------------------------------------------------------------------


def test_a_job_killed_at_any_point_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.batch_crashes", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.removeprefix("POINTS ")) > 25


def test_a_finished_job_starts_nothing(echo, tmp_path):
    first = run(ROWS, tmp_path / "out")
    assert echo.started == 1 and first.runner == "local"
    again = run(ROWS, tmp_path / "out", part_rows=None, parts_in_flight=1, page_size=32)
    assert echo.started == 1 and again.runner == "none"
    assert (again.total, again.now) == (first.total, Tally())
    os.remove(tmp_path / "out" / OWN / "report.json")
    assert run(ROWS, tmp_path / "out").total.completion_tokens == 20
    assert echo.started == 1


def test_only_what_is_missing_is_done(echo, tmp_path):
    run(ROWS, tmp_path / "out")
    before = output(tmp_path / "out")
    os.remove(tmp_path / "out" / "part-000001.jsonl")
    os.remove(tmp_path / "out" / OWN / "report.json")
    report = run(ROWS, tmp_path / "out")
    assert (report.now.rows, report.total.rows) == (4, 10)
    assert output(tmp_path / "out") == before


def test_a_folder_belongs_to_one_job(echo, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out"
    run(path, out, sampling_params={"top_k": 2})
    for changed, message in [
        ({"sampling_params": {"top_k": 3}}, r"sampling_params is \{'top_k': 3\}, and was"),
        ({"model_path": "other"}, "model_path is 'other', and was 'model'"),
        ({"output_ids": True}, "results is"),
        ({"part_rows": 5}, "part_rows is 5, and was 4"),
        ({"random_seed": 5}, "random_seed is 5, and was None"),
        ({"prompt_column": "id"}, "columns is"),
        ({"output_format": "jsonl", "dtype": "bfloat16"}, "dtype is 'bfloat16', and was 'auto'"),
    ]:
        with pytest.raises(
            jaxserve.InvalidRequestError, match=f"belongs to another job: {message}"
        ):
            run(path, out, **({"sampling_params": {"top_k": 2}} | changed))
    os.utime(path)  # another time, the same content
    assert run(path, out, sampling_params={"top_k": 2}).now.rows == 0
    with open(path, "a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(jaxserve.InvalidRequestError, match=r"input '.*another content"):
        run(path, out, sampling_params={"top_k": 2})
    run(ROWS, tmp_path / "listed")
    with pytest.raises(jaxserve.InvalidRequestError, match="another job: the 9 rows of the list"):
        run(ROWS[:9], tmp_path / "listed")
    assert echo.started == 2


def test_a_folder_of_something_else_is_left_alone(echo, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(jaxserve.InvalidRequestError, match=r"files of no batch job.*mine\.txt"):
        run(ROWS, tmp_path)
    with pytest.raises(jaxserve.InvalidRequestError, match="is a file, not a folder"):
        run(ROWS, tmp_path / "mine.txt")
    assert os.listdir(tmp_path) == ["mine.txt"]
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(jaxserve.InvalidRequestError, match="does not exist"):
        run(missing, tmp_path / "new")
    missing.write_text("nothing")
    with pytest.raises(jaxserve.InvalidRequestError, match="no JSONL file"):
        run(missing, tmp_path / "new")
    assert not (tmp_path / "new").exists() and echo.started == 0


def test_two_runs_do_not_share_a_folder(echo, tmp_path):
    run(ROWS[:4], tmp_path / "out")
    os.remove(tmp_path / "out" / "part-000000.jsonl")
    with open(tmp_path / "out" / OWN / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(jaxserve.InvalidRequestError, match="another run of this job"):
            run(ROWS[:4], tmp_path / "out")
    assert run(ROWS[:4], tmp_path / "out").now.rows == 4


def test_an_engine_that_dies_ends_the_job_and_keeps_what_is_done(echo, tmp_path, monkeypatch):
    def generate(self, prompt=None, sampling_params=None, input_ids=None):
        if "p5" in prompt:
            raise jaxserve.EngineDeadError("the engine is dead")
        return [self._one(*row) for row in zip(prompt, sampling_params, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(EchoEngine, "generate", generate)
        with pytest.raises(jaxserve.EngineDeadError):
            run(ROWS, tmp_path / "out", parts_in_flight=1)
    assert (tmp_path / "out" / "part-000000.jsonl").exists()
    report = run(ROWS, tmp_path / "out")
    assert 4 <= report.now.rows <= 6 and report.total.rows == 10
    assert [answer["index"] for answer in output(tmp_path / "out")] == list(range(10))


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"runner": "slurm"}, "runner must be one of auto, local, ray, got 'slurm'"),
        ({"output_format": "csv"}, "output_format must be one of jsonl, parquet"),
        ({"part_rows": 0}, "part_rows must be at least 1, got 0"),
        ({"parts_in_flight": 0}, "parts_in_flight must be at least 1"),
        ({"dp_size": 0}, "dp_size must be at least 1"),
        ({"cost_per_hour": -1}, "cost_per_hour must be"),
        ({"sampling_params": {"n": 2}}, "n must be 1 in a batch job"),
        ({"sampling_params": {"top_q": 2}}, "unknown sampling parameter 'top_q'"),
        ({"max_queued_requests": 5}, "max_queued_requests=5 would refuse rows"),
        ({"base_gpu_id": 1}, "base_gpu_id=1 .*is not for a batch job.*CUDA_VISIBLE_DEVICES"),
        ({"model_path": None}, "model_path is required"),
        ({"page_sise": 5}, "unknown option 'page_sise'.*page_size"),
        ({"server_args": jaxserve.ServerArgs("m")}, "server_args is given; put model_path into it"),
        ({"rows": 5}, "input must be a path, a list of paths"),
        ({"rows": [{"prompt": "a"}, 5]}, r"input\[1\] must be a dict, got 5"),
        ({"rows": [{"prompt": object()}]}, r"input\[0\] must be JSON, got <object"),
    ],
)
def test_mistakes_are_said_before_anything_happens(echo, tmp_path, more, message):
    rows = more.pop("rows", ROWS)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        run(rows, tmp_path / "out", **more)
    assert isinstance(raised.value, jaxserve.JaxserveError)
    assert not (tmp_path / "out").exists() and echo.started == 0


def test_without_ray_the_extra_is_named_and_auto_is_local(echo, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "installed", lambda: False)
    with pytest.raises(jaxserve.NotSupportedError, match=r"pip install jaxserve\[ray\]"):
        run(ROWS, tmp_path / "out", runner="ray")
    assert run(ROWS, tmp_path / "out", runner="auto").runner == "local"


def test_without_pyarrow_the_extra_is_named(echo, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "installed", lambda: False)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    for more in ({"rows": ROWS, "output_format": "parquet"}, {"rows": tmp_path / "in.parquet"}):
        with pytest.raises(jaxserve.NotSupportedError, match=r"pip install jaxserve\[parquet\]"):
            run(more.pop("rows"), tmp_path / "out", **more)


def test_each_process_has_gpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.devices(2, 1, tmp_path) == ["", ""]  # no GPU here
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert local.devices(2, 2, tmp_path) == ["0,1", "2,3"]
    assert local.devices(3, 1, tmp_path) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a,1")
    assert local.devices(3, 1, tmp_path) == ["3", "GPU-8a", "1"]
    message = "dp_size=2 engines of tp_size=2 need 4 GPUs, and there are 3: 3,GPU-8a,1"
    with pytest.raises(jaxserve.InvalidRequestError, match=message):
        local.devices(2, 2, tmp_path)


def test_neither_ray_nor_jax_is_imported_before_it_is_wanted():
    program = (
        "import sys, jaxserve, jaxserve.batch, jaxserve.batch.on_ray, jaxserve.batch.local;"
        "assert not {'ray', 'jax', 'pyarrow', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_report_counts_tokens_and_money():
    now = Tally(10, 1, 500_000, 250_000, 100, started=100.0, ended=150.0)
    report = Report(now + Tally(5, 1), now, "out", "local", seconds=72.0, cost_per_hour=50.0)
    assert report.cost == pytest.approx(1.0)
    assert str(report).splitlines() == [
        "15 rows in out, 2 of them failed; 500,000 prompt tokens (100 cached), "
        "250,000 output tokens",
        "this run (local): 10 rows in 72.0 s, 50.0 s of them generating: 0.2 rows/s, "
        "10,000 prompt and 5,000 output tokens/s",
        "cost: 1.0000, 4.0000 a million output tokens, 1.3333 a million tokens, prompts included",
    ]
    assert "nothing was left" in str(Report(now, Tally(), "out", "none"))


def test_the_command_line_is_the_function(echo, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--model", "model", "--input", str(path), "--output", str(tmp_path / "out")]
    more = ["--sampling-params", '{"top_k": 4}', "--runner", "local", "--cost-per-hour", "3"]
    assert main([*arguments, *more]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("10 rows in ") and "a million output tokens" in printed.out
    assert "Rows" not in printed.err  # no bar where there is no terminal
    assert [answer["text"] for answer in output(tmp_path / "out")] == [
        f"p{number}|{{'top_k': 4}}" for number in range(10)
    ]
    assert main([*arguments, *more]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert main([*arguments, "--runner", "local"]) == 1
    assert "belongs to another job" in capsys.readouterr().err
    assert main([*arguments, "--sampling-params", "{", "--runner", "local"]) == 1
    assert "sampling_params is not valid JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--model", "model"])


# -- engines ---------------------------------------------------------------------------------------

SAMPLING = {"temperature": 0.0, "max_new_tokens": 6}
OPTIONS = {"context_length": 256, "max_total_tokens": 4096, "cuda_graph_bs": [16]}


def test_a_job_says_what_the_engine_says(tiny_models, tmp_path):
    model = tiny_models("llama")
    talk = [{"role": "user", "content": "Hello"}]
    rows = [{"prompt": f"The number {number} is"} for number in range(12)]
    rows += [{"messages": talk}, {"input_ids": [5, 6, 7], "max_new_tokens": 3}]
    rows += [{"prompt": ""}, {"input_ids": [10**6]}, {"prompt": "word " * 2000}]
    report = run(
        rows,
        tmp_path / "out",
        model_path=model,
        sampling_params=SAMPLING,
        part_rows=None,
        **OPTIONS,
    )
    assert (report.total.rows, report.total.failed) == (17, 3)
    answers = output(tmp_path / "out")
    with jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        expected = engine.generate([row["prompt"] for row in rows[:12]], SAMPLING)
        expected.append(engine.chat(talk, SAMPLING))
        expected.append(
            engine.generate(input_ids=[5, 6, 7], sampling_params={**SAMPLING, "max_new_tokens": 3})
        )
    for answer, result in zip(answers, expected, strict=False):
        meta = result["meta_info"]
        assert answer["text"] == result["text"]
        assert answer["prompt_tokens"] == meta["prompt_tokens"]
        assert answer["completion_tokens"] == meta["completion_tokens"]
        assert answer["finish_reason"] == meta["finish_reason"]["type"]
    assert [bool(answer["error"]) for answer in answers] == [False] * 14 + [True] * 3


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing(tiny_models, tmp_path):
    """Two processes, one of which is killed; in a process of their own, since they are spawned."""
    rows = [{"prompt": f"The number {number} is"} for number in range(120)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-W", "error", "-m", "jaxserve.batch", "--model", tiny_models("llama")),
        *("--input", str(path), "--output", str(tmp_path / "out"), "--dp-size", "2"),
        *("--runner", "local", "--part-rows", "4", "--parts-in-flight", "1"),
        *("--sampling-params", json.dumps({**SAMPLING, "max_new_tokens": 24})),
        *("--context-length", "256", "--max-total-tokens", "4096", "--cuda-graph-bs", "4"),
    ]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        wait_for(lambda: len(list((tmp_path / "out").glob("*.jsonl"))) >= 4)
        [killed, *_] = [p for p in children(job.pid) if "spawn_main" in " ".join(p.cmdline())]
        killed.send_signal(signal.SIGKILL)
        printed, said = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, said[-4000:]
    assert "120 rows" in printed
    answers = output(tmp_path / "out")
    assert [answer["index"] for answer in answers] == list(range(120))
    assert not any(answer["error"] for answer in answers)


def children(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
