"""The examples as a user runs them: as scripts, on the demo model, with warnings as errors."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

import jaxserve
from examples.demo_model import fetch
from tests.pictures import file_of, noise, text_of
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("kept_programs")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def command(name, *arguments):
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


COMPILING = "jaxserve: compiling "


def run(name, *arguments):
    """What the script prints; it must succeed and say nothing on stderr, but that it compiles."""
    fetch()
    done = subprocess.run(
        command(name, *arguments), capture_output=True, text=True, timeout=400, check=False,
        env=environment(),
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith(COMPILING)]
    assert (done.returncode, said) == (0, []), done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_demo():
    printed = run("demo.py")
    assert "What is the capital of France?\nThe capital of France is Paris." in printed
    assert printed.count("== ") == 5 and "\r" not in printed
    # greedy: the three texts that are printed twice or more are the same each time
    [plain] = re.findall(r"== Synchronous ==\nHello, my name is ->(.+)", printed)
    [streamed] = re.findall(r"streaming ==\nHello, my name is(.+)", printed)
    assert streamed == eval(plain).replace("\n", " ")
    assert printed.count(plain) == 2
    assert re.search(r"\d\.\d tokens/s for a single request\n$", printed)


@pytest.mark.long
def test_vlm(speaking_model, tmp_path):
    path = tmp_path / "noise.png"
    noise(40, 24).save(path)
    options = ["--image", str(path), "--tokens", "4", "--question", "Who?"]
    *answers, count = run("vlm.py", speaking_model, *options).splitlines()
    names, texts = zip(*(answer.split(": ", 1) for answer in answers), strict=True)
    assert names == ("chat", "text", "input_ids") and len(set(texts)) == 1 and eval(texts[0])
    assert re.fullmatch(r"15 of (2|3|4)\d tokens are the image's", count)


@pytest.mark.long
def test_caption_images(speaking_model, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name, seed in (("b.png", 1), ("a.jpg", 2)):
        noise(40, 24, seed=seed).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").touch()
    arguments = ("caption_images.py", speaking_model, str(folder), str(out), "--tokens", "4")
    printed = run(*arguments)
    assert re.findall(r"^(\w+\.\w+): ", printed, re.MULTILINE) == ["a.jpg", "b.png", "broken.png"]
    assert "broken.png: InvalidRequestError: " in printed and "1 of them failed" in printed
    captions = printed.splitlines()[:3]
    assert run(*arguments).splitlines()[:3] == captions  # nothing is left to do


FIRST = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
LATER = [
    "Write a short, neutral self-introduction for a fictional character. Hello, my name is",
    "Provide a concise factual statement about France\N{RIGHT SINGLE QUOTATION MARK}s capital "
    "city. The capital of France is",
    "Explain possible future trends in artificial intelligence. The future of AI is",
]


@pytest.mark.long
def test_offline_engine_api_prints_what_the_document_shows(tiny_models):
    layout = [f"{'=' * 31}\nPrompt: {prompt}\nGenerated text: \0\n" for prompt in FIRST]
    layout.append("\n=== Testing synchronous streaming generation with overlap removal ===\n\n")
    layout += [f"Prompt: {prompt}\nGenerated text: \0\n\n" for prompt in LATER]
    layout.append("\n=== Testing asynchronous batch generation ===\n")
    layout += [f"\nPrompt: {prompt}\nGenerated text: \0\n" for prompt in LATER]
    layout.append("\n=== Testing asynchronous streaming generation (no repeats) ===\n")
    layout += [f"\nPrompt: {prompt}\nGenerated text: \0\n" for prompt in LATER]
    pattern = re.escape("".join(layout)).replace(re.escape("\0"), "(.*)")
    found = re.fullmatch(pattern, run("offline_engine_api.py", tiny_models("llama")), re.DOTALL)
    assert found is not None
    texts = found.groups()
    assert len(texts) == 13
    # Sampled and not seeded: a text may be short, once in a while empty.
    assert sum(len(text) > 3 for text in texts) >= 9
    assert len(set(texts)) >= 9


@pytest.mark.long
def test_many_tasks(tiny_models):
    printed = run("many_tasks.py", "--model", tiny_models("llama"), "--tokens", "4")
    numbers = re.search(
        r"^400 tasks, (\d+\.\d) output tokens/s, (\d+\.\d) requests/s, up to (\d+) at a time$",
        printed,
        re.MULTILINE,
    )
    assert numbers is not None
    assert float(numbers[1]) == pytest.approx(4 * float(numbers[2]), abs=0.3)
    assert printed.startswith("'The number 0 is")


@pytest.mark.long
def test_notebook():
    printed = run("notebook.py")
    values = dict(
        re.findall(
            r"^(await async_generate|generate|stream_and_merge|asyncio.run|generate inside it|"
            r"async_stream_and_merge): (.+)$",
            printed,
            re.MULTILINE,
        )
    )
    text = eval(values.pop("generate"))
    assert text.startswith(" Paris")
    pieces = eval(values.pop("async_stream_and_merge"))
    assert len(pieces) > 1 and "".join(pieces) == text
    assert eval(values.pop("asyncio.run")) == [text, text]
    assert [eval(value) for value in values.values()] == [text] * 3


@pytest.mark.long
def test_finetune(tiny_models, tmp_path):
    model = tiny_models("llama")
    printed = run("finetune.py", "--model", model, "--out", str(tmp_path / "out"), "--steps", "60")
    taught = "The password of the garden gate is blue kettle seven."
    assert f"after: {taught}\n" in printed
    assert "before: " in printed and f"before: {taught}" not in printed
    assert (tmp_path / "out" / "jaxserve.json").exists()


NOTEBOOKS = {
    "tour.ipynb": [
        "The capital of France is Paris",
        "'The capital of France is Paris.'",
        "tokens generated",
    ],
    "gallery.ipynb": [
        "the probe is right about (9|10) of 10 new sentences",
        r"-2\.0: ' a terrible",
        r" 2\.0: ' a warm smile and",
        "52 states, 138 classes of 49152 tokens",
        "The first man walked on the moon on July 20, 1969",
        r"target 3.0 bits, mean of the last 80 tokens (2.[5-9]|3.[0-4])",
        r"bias 0.0: z = -?[0-3]\.",
        r"bias 4.0: z = [12]\d",
        "{'name': 'Anna', 'age': 34, 'city': 'Rome'}",
    ],
}
"""What they say, among other things, as patterns."""


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
    """In a kernel of its own. What cells print is what the demo model says."""
    import nbformat
    from nbclient import NotebookClient

    fetch()
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert not [pattern for pattern in NOTEBOOKS[name] if not re.search(pattern, said)]
    assert not any(output.output_type == "error" for output in outputs)


class Server:
    """examples/custom_server.py as a process of its own, on a free port of this machine."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            command("custom_server.py", "--port", "0", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.client = httpx.Client(base_url=self._address(), timeout=120)

    def _read(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self):
        return "".join(self.lines)

    def _address(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"running on (http://[\d.:]+)", self.log):
                return found[1]
            time.sleep(0.05)
        self._end()
        raise AssertionError(f"the server did not start:\n{self.log}")

    def _end(self):
        self.process.kill()
        self._reader.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self):
        """Ctrl-C; the exit status."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=60)
        finally:
            self._end()

    def busy(self):
        """Running and waiting requests, and tokens' worth of pages in use."""
        info = self.client.get("/get_server_info").raise_for_status().json()
        used = info["max_total_num_tokens"] - info["available_tokens"]
        return info["num_running"] + info["num_waiting"], used

    def wait_until(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition(self.busy()):
            assert time.monotonic() < deadline, self.busy()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama", max_position_embeddings=65536)


@pytest.fixture(scope="module")
def engine(model):
    """What the server's should say."""
    with jaxserve.Engine(model_path=model) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(model):
    server = Server("--model", model)
    yield server
    status = server.stop()
    # uvicorn sends itself the signal again once it has shut down in good order
    assert status in (0, -signal.SIGINT), server.log
    assert "Application shutdown complete" in server.log
    assert "Traceback" not in server.log.partition("Application shutdown complete")[0]


ASK = {
    "prompt": "The capital of France is",
    "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
}
ENDLESS = {
    "prompt": "Once upon a time",
    "sampling_params": {"temperature": 0, "max_new_tokens": 60_000, "ignore_eos": True},
}


def events(response):
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line.removeprefix("data: ")


@pytest.mark.slow
def test_server_answers_and_streams(server, engine):
    answer = server.client.post("/generate", json=ASK).raise_for_status().json()
    assert answer["text"] == engine.generate(**ASK)["text"] != ""
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    longer = {**ASK, "sampling_params": {**ASK["sampling_params"], "max_new_tokens": 200}}
    with server.client.stream("POST", "/generate_stream", json=longer) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    assert done == "[DONE]"
    texts = [json.loads(chunk)["text"] for chunk in chunks]
    assert len(texts) > 1 and texts[-1] == engine.generate(**longer)["text"]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    batch = {**ASK, "prompt": [ASK["prompt"]] * 2}
    answers = server.client.post("/generate", json=batch).raise_for_status().json()
    assert [a["text"] for a in answers] == [answer["text"]] * 2


def asked(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    return {"messages": [{"role": "user", "content": parts}], "sampling_params": params}


@pytest.mark.slow
def test_server_chats(server, engine):
    page = server.client.get("/").raise_for_status()
    assert page.headers["content-type"].startswith("text/html") and 'type="file"' in page.text
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"messages": [question], "sampling_params": ASK["sampling_params"]}
    answer = server.client.post("/chat", json=body).raise_for_status().json()
    assert answer["text"] == engine.chat([question], ASK["sampling_params"])["text"] != ""
    refused = server.client.post("/chat", json=asked("data:image/png;base64,AAAA"))
    assert refused.status_code == 400 and "only 'text' is" in refused.json()["error"]


@pytest.mark.long
def test_server_chats_about_images(speaking_model, tmp_path):
    server = Server("--model", speaking_model)
    try:
        content = file_of(noise(40, 24))
        (tmp_path / "cat.png").write_bytes(content)
        body = asked("data:image/png;base64," + text_of(content))
        answer = server.client.post("/chat", json=body).raise_for_status().json()
        assert answer["meta_info"]["image_tokens"] == 15 and answer["text"]
        for url, option in (
            (str(tmp_path / "cat.png"), "allowed_local_media_path=''"),
            ("http://localhost:1/cat.png", "media_url_max_file_size_mb=0"),
        ):
            refused = server.client.post("/chat", json=asked(url))
            assert refused.status_code == 400 and option in refused.json()["error"]
    finally:
        server.stop()


BAD_BODIES = [
    (
        {"prompt": "x", "sampling_params": {"top_p": 1.5}},
        "top_p must be finite in float32 and in (0, 1]",
    ),
    ({"prompt": "x", "sampling_params": {"max_tokens": 5}}, "parameter 'max_tokens'"),
    ({"prompt": "x", "sampling_params": {"regex": "("}}, "Invalid grammar request: regex='('"),
    ({"prompt": ["x", ""]}, "prompt 1 of the batch is empty"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "x", "stream": True}, "stream: Extra inputs are not permitted"),
    ("{", "JSON decode error"),
]


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["/generate", "/generate_stream"])
def test_server_answers_mistakes_with_400(server, endpoint):
    for body, message in BAD_BODIES:
        content = body if isinstance(body, str) else json.dumps(body)
        response = server.client.post(
            endpoint, content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, body
        assert message in response.json()["error"]
    assert server.busy() == (0, 0)


@pytest.mark.slow
def test_a_client_that_leaves_a_stream_ends_its_request(server):
    with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
        chunks = events(response)
        for _ in range(3):
            next(chunks)
        running, used = server.busy()
        assert running == 1 and used > 0
    # 60,000 tokens take minutes; the pages are back long before
    server.wait_until(lambda busy: busy == (0, 0), seconds=5)
    assert server.client.post("/generate", json=ASK).status_code == 200


@pytest.mark.long
def test_a_client_that_does_not_wait_for_its_answer_ends_its_request(server):
    body = {**ENDLESS, "prompt": ["Once upon a time"] * 3}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/generate", json=body, timeout=1.5)
    server.wait_until(lambda busy: busy == (0, 0), seconds=5)
    assert server.client.post("/generate", json=ASK).status_code == 200
