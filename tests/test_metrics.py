"""get_server_info(), engine.metrics, times in results and logs, on known workloads."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import time
import urllib.request

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxserve
from jaxserve.errors import InvalidRequestError, NotSupportedError, RequestFailedError
from jaxserve.output.stats import BOUNDS, LATENCIES
from tests import inside
from tests.api_fakes import Fakes, byte_level_tokenizer, loop_of

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 8,
    "cuda_graph_bs": [1, 8],
    "chunked_prefill_size": 128, "max_total_tokens": 1024, "page_size": 16,
    "enable_metrics": True, "served_model_name": "tiny", "disable_radix_cache": True,
}  # fmt: skip
LENGTHS, NEW = (3, 40, 17, 90), (5, 9, 1, 12)
PROMPTS = [[(7 * n + i) % 500 + 4 for i in range(length)] for n, length in enumerate(LENGTHS)]
PARAMS = [{"temperature": 0, "max_new_tokens": new, "ignore_eos": True} for new in NEW]
LONG = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}


@pytest.fixture
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        yield engine


def samples(registry):
    """A scrape's samples: (name, labels but the model's) -> value."""
    text = prometheus_client.generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            found[sample.name.removeprefix("jaxserve_"), *sample.labels.values()] = sample.value
    return found


def test_counts_of_a_known_workload(engine):
    engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    forever = {**PARAMS[0], "stop_token_ids": list(range(512))}
    engine.generate(input_ids=PROMPTS[0], sampling_params=forever)
    info, scraped = engine.get_server_info(), samples(engine.metrics)
    assert info["prompt_tokens"] == scraped["prompt_tokens_total",] == sum(LENGTHS) + LENGTHS[0]
    assert info["generated_tokens"] == scraped["generation_tokens_total",] == sum(NEW) + 1
    assert info["finished_requests"] == {"stop": 1, "length": 4, "abort": 0, "error": 0}
    for reason, count in info["finished_requests"].items():
        assert scraped["finished_requests_total", reason] == count
    assert info["retractions"] == info["cached_tokens"] == info["cache_hit_rate"] == 0
    assert (info["num_running"], info["num_waiting"], info["num_used_pages"]) == (0, 0, 0)
    assert info["token_usage"] == 0 and info["num_pages"] == 1024 // 16
    assert scraped["steps_total", "extend"] == info["extend_steps"] >= 2
    # one prompt's first chunk may share the step of others: at least the longest decode
    assert max(NEW) - 1 <= scraped["steps_total", "decode"] == info["decode_steps"] <= sum(NEW)
    assert scraped["up",] == 1 and scraped["late_compiles_total",] == info["late_compiles"] == 0
    assert scraped["gen_throughput",] == info["last_gen_throughput"] > 0
    phases = {key[1] for key in scraped if key[0] == "host_seconds_total"}
    assert phases == set(info["host_seconds"])


def test_latencies_are_those_of_the_results(engine):
    """Histogram sums and buckets against the requests' own times."""
    results = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    metas = [result["meta_info"] for result in results]
    scraped = samples(engine.metrics)
    for meta in metas:
        received, queued = meta["request_received_ts"], meta["api_server_dispatch_finish_ts"]
        entered, first = meta["forward_entry_time"], meta["prefill_finished_time"]
        assert received <= queued <= entered <= first <= meta["request_finished_ts"] <= time.time()
        assert meta["queue_time"] == pytest.approx(entered - queued, abs=1e-5)
        assert meta["time_to_first_token"] == pytest.approx(first - received, abs=1e-5)
        assert meta["e2e_latency"] == pytest.approx(
            meta["request_finished_ts"] - received, abs=1e-5
        )
    expected = {
        "queue_time_seconds": [m["queue_time"] for m in metas],
        "time_to_first_token_seconds": [m["time_to_first_token"] for m in metas],
        "e2e_request_latency_seconds": [m["e2e_latency"] for m in metas],
        "time_per_output_token_seconds": [
            1 / m["decode_throughput"] for m in metas if m["completion_tokens"] > 1
        ],
    }
    for name, values in expected.items():
        assert scraped[name + "_count",] == len(values)
        assert scraped[name + "_sum",] == pytest.approx(sum(values), rel=1e-5)
        for bound in BOUNDS:
            upto = sum(value <= bound for value in values)
            assert scraped[name + "_bucket", str(bound)] == upto
        assert scraped[name + "_bucket", "+Inf"] == len(values)
    assert set(engine.get_server_info()["latencies"]) == set(LATENCIES)


def test_retractions_aborts_and_what_still_runs(engine):
    """A pool for about four of eight requests: the counters are the sums of the results' own."""
    longest = {**LONG, "max_new_tokens": 240}
    results = engine.generate(input_ids=PROMPTS[:1] * 8, sampling_params=longest)
    retracted = sum(result["meta_info"]["num_retractions"] for result in results)
    assert engine.get_server_info()["retractions"] == retracted > 0
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params=longest, stream=True)
    next(stream)
    info = engine.get_server_info()
    assert (info["num_running"], info["prompt_tokens"]) == (1, 9 * LENGTHS[0])
    assert 0 < info["num_used_pages"] == round(info["token_usage"] * info["num_pages"])
    stream.close()
    info = engine.get_server_info()
    assert info["finished_requests"] == {"stop": 0, "length": 8, "abort": 1, "error": 0}
    assert info["latencies"]["e2e_latency"]["counts"] != [0] * (len(BOUNDS) + 1)
    assert sum(info["latencies"]["e2e_latency"]["counts"]) == 8
    assert samples(engine.metrics)["retractions_total",] == retracted


def test_queued_requests_count_as_such(engine):
    async def main():
        tasks = [
            asyncio.create_task(engine.async_generate(input_ids=PROMPTS[0], sampling_params=LONG))
            for _ in range(12)
        ]
        await asyncio.sleep(0)
        while engine.get_server_info()["num_running"] < 6:
            await asyncio.sleep(0.001)
        info = engine.get_server_info()
        assert info["num_running"] + info["num_waiting"] == 12
        engine.abort_request(abort_all=True)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    info = engine.get_server_info()
    assert info["finished_requests"]["abort"] == 12
    assert info["prompt_tokens"] < 12 * LENGTHS[0], "those that never ran count nowhere"
    assert info["prompt_tokens"] % LENGTHS[0] == 0


def test_failed_requests_count_as_errors(engine, monkeypatch):
    def prepare(batch):
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(inside.runner(engine), "prepare", prepare)
    with pytest.raises(RequestFailedError, match="ZeroDivisionError: injected"):
        engine.generate(input_ids=PROMPTS[0], sampling_params=LONG)
    assert engine.get_server_info()["finished_requests"]["error"] == 1


def test_a_server_for_one_engine_or_for_all(engine):
    """As docs/api.md says: one's own endpoint, or beside the process's other metrics."""
    engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS[0])
    server, thread = prometheus_client.start_http_server(
        0, addr="127.0.0.1", registry=engine.metrics
    )
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    with urllib.request.urlopen(url) as reply:
        text = reply.read().decode()
    server.shutdown()
    server.server_close()
    thread.join()
    assert 'jaxserve_generation_tokens_total{model_name="tiny"} 5.0' in text
    assert engine.metrics is engine.metrics
    assert "jaxserve" not in prometheus_client.generate_latest().decode()
    prometheus_client.REGISTRY.register(engine.metrics)
    try:
        assert "jaxserve_up" in prometheus_client.generate_latest().decode()
    finally:
        prometheus_client.REGISTRY.unregister(engine.metrics)


def test_a_stopped_engine_is_down(tiny_models):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    registry = engine.metrics
    engine.shutdown()
    assert samples(registry) == {("up",): 0}


def test_a_registry_keeps_no_engine_alive(tiny_models):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    registry = engine.metrics
    assert samples(registry)["up",] == 1
    del engine
    gc.collect()
    assert samples(registry) == {("up",): 0}


def test_metrics_must_be_asked_for_and_installed(fakes_engine, monkeypatch):
    with pytest.raises(InvalidRequestError, match=r"engine\.metrics needs enable_metrics=True"):
        fakes_engine().metrics  # noqa: B018
    engine = fakes_engine(enable_metrics=True)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(NotSupportedError, match=r"pip install jaxserve\[metrics\]"):
            engine.metrics  # noqa: B018
    assert "queue_time" in engine.generate("ab", {"max_new_tokens": 1})["meta_info"]


@pytest.fixture
def fakes_engine(monkeypatch):
    fakes = Fakes(byte_level_tokenizer(), monkeypatch)
    yield fakes.engine
    fakes.close()


# -- the progress log ------------------------------------------------------------------------------

PREFILL = re.compile(
    r"Prefill batch, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+), "
    r"token usage: ([\d.]+), #running-req: (\d+), #queue-req: (\d+)"
)
DECODE = re.compile(
    r"Decode batch, #running-req: (\d+), #token: (\d+), token usage: ([\d.]+), "
    r"gen throughput \(token/s\): ([\d.]+), #queue-req: (\d+)"
)


def lines(caplog, pattern):
    found = (pattern.fullmatch(record.getMessage()) for record in caplog.records)
    return [tuple(float(x) for x in match.groups()) for match in found if match]


def test_the_progress_log(tiny_models, caplog):
    options = {**OPTIONS, "log_level": "info", "decode_log_interval": 10}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        engine.generate(input_ids=PROMPTS, sampling_params=[{**LONG, "max_new_tokens": 60}] * 4)
        info = engine.get_server_info()
    prefill, decode = lines(caplog, PREFILL), lines(caplog, DECODE)
    assert sum(line[0] for line in prefill) == 4
    assert sum(line[1] for line in prefill) == sum(LENGTHS)
    assert len(prefill) == info["extend_steps"]
    assert len(decode) == info["decode_steps"] // 10
    for running, tokens, usage, _, queued in decode:
        assert queued == 0 and 0 < running <= 4
        assert tokens % 16 == 0 and usage == pytest.approx(tokens / 1024, abs=0.006)
    assert decode[-1][3] > 0


def test_the_default_is_silence(tiny_models, caplog):
    options = {**OPTIONS, "decode_log_interval": 1}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    assert not caplog.records


# -- the request log -------------------------------------------------------------------------------


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "jaxserve.requests"]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_what_each_level_logs(fakes_engine, caplog, level):
    engine = fakes_engine(
        log_requests=True, log_requests_level=level, context_length=8192, max_total_tokens=8192
    )
    prompt = "Hello, my name is Jax. " * 200
    result = engine.generate(
        prompt, {"max_new_tokens": 1500, "temperature": 0.5, "ignore_eos": True}, rid="mine"
    )
    received, finished = messages(caplog)
    meta = result["meta_info"]
    assert received.startswith(f"Receive: rid='mine', prompt_tokens={meta['prompt_tokens']}, ")
    assert finished.startswith(f"Finish: rid='mine', finish_reason={meta['finish_reason']}, ")
    assert "completion_tokens=1500" in finished and "e2e_latency=" in finished
    assert ("temperature" in received) == (level >= 1)
    assert ("input='Hello, my name" in received) == ("output=" in finished) == (level >= 2)
    assert (" ... " in received) == (level == 2)
    if level == 2:
        assert len(received) < 2400 and len(finished) < 2400
    if level == 3:
        assert repr(prompt) in received and repr(result["text"]) in finished


def test_the_log_of_streams_aborts_and_failures(fakes_engine, caplog):
    engine = fakes_engine(log_requests=True, skip_tokenizer_init=True, pause=0.001)
    list(engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 3}, stream=True))
    received, finished = messages(caplog)
    assert "stream=True" in received and "input=[5, 6]" in received
    assert "output=[5, 6, 5]" in finished
    caplog.clear()
    params = {"max_new_tokens": 400}
    stream = engine.generate(input_ids=[5, 6], sampling_params=params, stream=True, rid="gone")
    next(stream)
    stream.close()
    assert messages(caplog)[1:] == ["Abort: rid='gone'"]
    caplog.clear()

    def call():
        with pytest.raises(jaxserve.EngineDeadError):
            engine.generate(input_ids=[5, 6], sampling_params=params, rid="dead")

    thread = threading.Thread(target=call)
    thread.start()
    while not loop_of(engine).live:
        time.sleep(0.001)
    loop_of(engine).die(jaxserve.EngineDeadError("injected"))
    thread.join()
    assert messages(caplog)[1] == "Fail: rid='dead', error='EngineDeadError: injected'"


def test_no_log_unless_asked(fakes_engine, caplog):
    with caplog.at_level(logging.DEBUG):
        fakes_engine().generate("ab", {"max_new_tokens": 2})
    assert not messages(caplog)
