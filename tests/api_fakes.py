"""An engine without a model: a thread that plays scripted tokens under the loop's contract."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxserve.engine
from jaxserve.apart import Apart
from jaxserve.api.model_facts import ModelFacts
from jaxserve.api.startup import Started, tokenizer_eos
from jaxserve.config import Limits, States
from jaxserve.engine import Engine
from jaxserve.errors import EngineDeadError, EngineShutdownError
from jaxserve.output.commit import ABORTED, fail, finish, finish_reason, report
from jaxserve.output.extras import Reported
from jaxserve.output.logprobs import LogprobExtra
from jaxserve.request import Request
from jaxserve.text.codec import Codec
from tests.oracles.payloads import MOST_TOP, pack_logprobs

if TYPE_CHECKING:
    from jaxserve.api.profile import ProfileSpec
    from jaxserve.scheduler.scheduler import Scheduler

CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Hello, my name is Jax and I am happy, ha ha ha!",
    "naïve café 日本語 🙂 — done\nUser: hi\n\nAssistant: hello",
]
EOS, IM_START, IM_END = "<|eos|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(merges: int = 60) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every byte is a token, so characters can be split anywhere."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 3 + merges,
        special_tokens=[EOS, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words carry their space, the first space is dropped, bytes
    that are no word come from byte tokens."""
    words = [
        *[
            "The",
            "capital",
            "of",
            "France",
            "is",
            "Paris",
            "and",
            "Rome",
            ",",
            ".",
            "!",
            "a",
            "b",
            "c",
        ]
    ]
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for word in words:
        vocab.setdefault("▁" + word, len(vocab))
        vocab.setdefault(word, len(vocab))
    vocab.setdefault("▁", len(vocab))
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


Script = Callable[[Request, int], int]
"""The token that a request samples as its i-th."""


def echo(request: Request, step: int) -> int:
    """Repeats the prompt for ever."""
    return request.prompt_ids[step % len(request.prompt_ids)]


class FakeLoop:
    """A core.Core that plays `script`, one token per step for all requests."""

    def __init__(self, limits: Limits, script: Script = echo, pause: float = 0.0) -> None:
        self.limits = limits
        self.script = script
        self.pause = pause
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.dead: BaseException | None = None
        self._changed = threading.Condition()
        self._live: list[Request] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- the contract -----------------------------------------------------------------------------

    @property
    def apart(self) -> Apart:
        """Of nobody: what is registered is compiled nowhere."""
        return Apart([])

    def submit(self, requests: Sequence[Request]) -> None:
        with self._changed:
            if self.dead is not None:
                raise self.dead
            for request in requests:
                request.submitted_time = time.perf_counter()
            self.submitted += requests
            self._live += requests
            self._changed.notify()

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        with self._changed:
            self._abort([r for r in self._live if abort_all or (rid and r.rid.startswith(rid))])

    def abort_requests(self, requests: Sequence[Request]) -> None:
        with self._changed:
            self._abort([request for request in requests if request in self._live])

    def flush_cache(self) -> bool:
        with self._changed:
            return not self._live

    def stats(self) -> dict[str, Any]:
        with self._changed:
            if self.dead is not None:
                raise self.dead
            return {
                "page_size": 16,
                "available_tokens": self.limits.max_total_tokens,
                "max_total_num_tokens": self.limits.max_total_tokens,
                "max_running_requests": 8,
                "late_compiles": 0,
                "num_running": len(self._live),
                "num_waiting": 0,
                "memory_usage": {"weight": 1.0, "kvcache": 2.0, "graph": 0.0},
                "last_gen_throughput": 3.0,
                "startup_time": 0.5,
                "host_ms_per_step": 0.1,
            }

    def start_profile(self, spec: ProfileSpec) -> None:
        raise NotImplementedError

    def stop_profile(self) -> None:
        raise NotImplementedError

    def shutdown(self) -> None:
        self.die(EngineShutdownError("the engine was shut down"))
        self._thread.join()

    # -- for tests --------------------------------------------------------------------------------

    def die(self, error: BaseException) -> None:
        """Stops the thread; every waiting request gets `error`."""
        with self._changed:
            if self.dead is None:
                self._die(error)
            self._changed.notify()

    @property
    def live(self) -> list[Request]:
        with self._changed:
            return list(self._live)

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self.aborted.append(request.rid)
            finish(request, dict(ABORTED), self._books)

    def _die(self, error: BaseException) -> None:
        self.dead = error
        for request in list(self._live):
            fail(request, error, self._books)

    @property
    def _books(self) -> Scheduler:
        """What ends a request in a list of live ones."""
        return cast("Scheduler", _Books(self._live))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._live and self.dead is None:
                    self._changed.wait()
                if self.dead is not None:
                    return
                for request in list(self._live):
                    self._step(request)
            if self.pause:
                time.sleep(self.pause)

    def _step(self, request: Request) -> None:
        try:
            token = self.script(request, len(request.output_ids))
        except Exception as error:
            dead = EngineDeadError(f"the engine has failed: {error}")
            dead.__cause__ = error
            self._die(dead)
            return
        self._add_logprobs(request, token)
        if request.first_token_time is None:
            request.first_token_time = time.perf_counter()
        if request.max_new_tokens == 0:
            request.unemitted_id = token
            finish(request, {"type": "length", "length": 0}, self._books)
            return
        request.output_ids.append(token)
        produced, interval = len(request.output_ids), request.stream_interval
        reason = finish_reason(request, token)
        if reason is not None:
            finish(request, reason, self._books)
        elif interval == 1 or (interval and produced % interval == 1):
            report(request)

    def _add_logprobs(self, request: Request, token: int) -> None:
        for extra in request.extras:
            assert isinstance(extra, LogprobExtra)
            prompt = request.prompt_ids
            successors = Reported({"logprobs": pack_logprobs(prompt[1:], extra.spec.ids)})
            extra.read_prompt(successors, 0, len(prompt), 0)
            extra.end_prompt(None)
            extra.read(Reported({"logprobs": pack_logprobs([token], extra.spec.ids)}), 0)


@dataclasses.dataclass(frozen=True)
class _Books:
    """All that ending a request needs of a scheduler."""

    live: list[Request]

    def finish(self, request: Request) -> None:
        self.live.remove(request)


@dataclasses.dataclass
class Fakes:
    """Makes engines on fake loops; `close` shuts them all down."""

    tokenizer: PreTrainedTokenizerFast
    monkeypatch: Any
    engines: list[Engine] = dataclasses.field(default_factory=list)

    def engine(
        self,
        script: Script = echo,
        pause: float = 0.0,
        context_length: int = 512,
        max_total_tokens: int = 4096,
        eos_ids: Sequence[int] = (),
        **options: Any,
    ) -> Engine:
        """An Engine whose loop is a FakeLoop, reachable as `engine._loop`."""
        vocabulary = len(self.tokenizer)
        sizes = vocabulary, context_length, max_total_tokens, 64, 5, 4, MOST_TOP, 6
        limits = Limits(*sizes, hidden_size=64, states=States(), max_state_bytes=0,
            most_of_a_picture=0, most_in_a_block=0, deterministic=False,
        )  # fmt: skip
        loop = FakeLoop(limits, script, pause)

        def start(args: Any) -> Started:
            tokenizer = None if args.skip_tokenizer_init else self.tokenizer
            eos = frozenset(eos_ids) | tokenizer_eos(tokenizer)
            facts = ModelFacts(
                model_path="fake", context_len=context_length, vocab_size=limits.vocab_size,
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, dtype="float32", quantization=None, hf_eos_token_id=eos,
                raw_config={"model_type": "llama"},
            )  # fmt: skip
            codec = None if tokenizer is None else Codec(tokenizer)
            return Started(loop, tokenizer, codec, eos, "dummy", model_config=facts)

        self.monkeypatch.setattr(jaxserve.engine, "start", start)
        engine = Engine(model_path="fake", **options)
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.shutdown()


def text_script(tokenizer: PreTrainedTokenizerFast, text: str) -> Script:
    """Generates `text` token by token, then end-of-text for ever."""
    ids: Any = tokenizer(text)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return lambda request, step: ids[step] if step < len(ids) else end


def loop_of(engine: Engine) -> FakeLoop:
    """The engine's fake loop."""
    loop = engine._loop
    assert isinstance(loop, FakeLoop)
    return loop


def chunks(ids: Sequence[int], rng: np.random.Generator) -> Iterator[Sequence[int]]:
    """The ids in random pieces."""
    start = 0
    while start < len(ids):
        stop = start + int(rng.integers(1, 5))
        yield ids[start:stop]
        start = stop
