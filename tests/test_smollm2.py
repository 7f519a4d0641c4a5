"""SmolLM2-135M-Instruct from its quantized GGUF file, against Hugging Face on the same weights."""

from __future__ import annotations

import math

import pytest
import torch

import converters
import jaxserve
from converters.save import save
from examples.demo_model import fetch
from tests.oracles.huggingface import TIE, Reference

# a real model: 0.5 GB in float32
pytestmark = [pytest.mark.usefixtures("kept_programs"), pytest.mark.slow]

GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
PROMPTS = [
    "The capital of France is",
    "Hello, my name is",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "Once upon a time, in a village between two rivers, there lived an old clockmaker who",
    "Der schnelle braune Fuchs springt",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 4, 8, 16,",
    "Emoji for happy: \N{SLIGHTLY SMILING FACE}, for sad:",
    "T",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine():
    with jaxserve.Engine(model_path=str(fetch()), max_total_tokens=4096) as engine:
        yield engine
        info = engine.get_server_info()
        assert info["late_compiles"] == 0
        assert info["available_tokens"] == info["max_total_num_tokens"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The torch model on the dequantized weights."""
    folder = tmp_path_factory.mktemp("smollm2") / "dequantized"
    save(converters.load(str(fetch()), dtype="float32"), folder, "safetensors")
    return Reference(str(folder))


def test_chat_knows_the_capital_of_france(engine):
    answer = engine.chat(QUESTION, {"temperature": 0, "max_new_tokens": 32})
    assert answer["text"] == "The capital of France is Paris."
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_chat_is_the_template_and_generate(engine):
    params = {"temperature": 0, "max_new_tokens": 16}
    chat = engine.chat(QUESTION, params, return_prompt_token_ids=True)
    prompt = engine.tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>assistant\n")
    plain = engine.generate(prompt, params, return_prompt_token_ids=True)
    for key in ("prompt_token_ids", "output_ids", "text"):
        assert chat[key] == plain[key]


@pytest.mark.long
def test_greedy_tokens_and_text_equal_hugging_face(engine, reference):
    """Each token must be the argmax of the logits that Hugging Face gives behind the same tokens:
    by induction the output of a plain argmax loop, at the price of one forward pass."""
    results = engine.generate(PROMPTS, {**GREEDY, "max_new_tokens": 32})
    prompts = engine.tokenizer(PROMPTS).input_ids
    outputs = [result["output_ids"] for result in results]
    assert [len(output) for output in outputs] == [32] * len(PROMPTS)
    # padding at the right is invisible to a causal model: no mask, no other positions
    rows = [torch.tensor(a + b) for a, b in zip(prompts, outputs, strict=True)]
    with torch.no_grad():
        logits = reference.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    ties = 0
    for prompt, output, row in zip(prompts, outputs, logits, strict=True):
        best = row[len(prompt) - 1 : len(prompt) + len(output) - 1]
        chosen = best.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (best.amax(1) - chosen).max() <= TIE
        ties += sum(a != b for a, b in zip(best.argmax(1).tolist(), output, strict=True))
    assert ties <= 1
    assert reference.greedy(prompts[0], 8) == outputs[0][:8]  # the loop itself, which is slow
    for result, prompt, output in zip(results, prompts, outputs, strict=True):
        assert result["meta_info"]["prompt_tokens"] == len(prompt)
        assert result["text"] == engine.tokenizer.decode(output, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_it(engine):
    free = engine.generate(PROMPTS[7], GREEDY)
    params = {"temperature": 0, "max_new_tokens": 64, "stop": ["zzzz", " 64,"]}
    result = engine.generate(PROMPTS[7], params)
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": " 64,"}
    assert result["text"] == free["text"].partition(" 64,")[0] == " 32,"
    assert result["output_ids"] == free["output_ids"][: len(result["output_ids"])]
    chunks = list(engine.generate(PROMPTS[7], params, stream=True))
    assert chunks[-1]["text"] == result["text"]
    assert all(result["text"].startswith(chunk["text"]) for chunk in chunks)


def test_streamed_emoji_arrive_whole(engine):
    """An emoji takes two or three tokens here; no chunk may show a part of one."""
    smile, rocket = "\N{SLIGHTLY SMILING FACE}", "\N{ROCKET}"
    prompt = f"smile {smile}\nrocket {rocket}\n" * 3 + "smile"
    params = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
    whole = engine.generate(prompt, params)["text"]
    assert whole.count(smile) >= 2 and whole.count(rocket) >= 2
    shown, deltas = "", []
    for chunk in engine.generate(prompt, params, stream=True):
        assert chunk["text"].startswith(shown)
        deltas.append(chunk["text"][len(shown) :])
        shown = chunk["text"]
    assert "".join(deltas) == whole
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


def test_logprobs_with_their_texts(engine, reference):
    result = engine.generate(
        PROMPTS[0], {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        return_logprob=True, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True,
    )  # fmt: skip
    meta = result["meta_info"]
    prompt = [token for _, token, _ in meta["input_token_logprobs"]]
    assert "".join(text for *_, text in meta["input_token_logprobs"]) == PROMPTS[0]
    assert "".join(text for *_, text in meta["output_token_logprobs"]) == result["text"]
    expected = reference.logprobs(prompt + result["output_ids"])
    for i, ((logprob, token, text), top) in enumerate(
        zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    ):
        row = expected[len(prompt) - 1 + i]
        assert logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert top[0] == (logprob, token, text)
        assert top[1][0] <= logprob
        assert math.isclose(top[1][0], float(row.topk(2).values[1]), abs_tol=1e-3)
        assert top[1][2] == engine.tokenizer.decode([top[1][1]])
