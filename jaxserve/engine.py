"""The public engine: SGLang's offline `Engine` on one thread of this process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from jaxserve import checks
from jaxserve.api import info
from jaxserve.api.algorithms import Algorithms
from jaxserve.api.arguments import Arguments, GenerateOptions
from jaxserve.api.call import AsyncStream, Call, LiveIds, Stream
from jaxserve.api.info import FlushResult, TokenizerManager
from jaxserve.api.inputs import RequestBuilder
from jaxserve.api.profile import ProfileSpec
from jaxserve.api.reading import PromptReader
from jaxserve.api.request_log import RequestLog
from jaxserve.api.startup import start
from jaxserve.api.unsupported import UnsupportedMethods
from jaxserve.bar import Bar
from jaxserve.chains.registry import Names
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.output.result import Output, ResultOptions
from jaxserve.process import Home, Uncopyable
from jaxserve.server_args import ServerArgs
from jaxserve.text.chat import ChatPrompts

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Result = dict[str, Any]


class Engine(Uncopyable, Algorithms, UnsupportedMethods):
    """A language model that generates text in this process.

        with Engine(model_path="path/to/model") as engine:
            print(engine.generate("The capital of France is")["text"])

    All methods may be called from any thread, inside running event loops and in notebooks; calls
    made at the same time are batched together. Options and results: docs/api.md.
    """

    def __init__(self, model_path: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        """Loads a model. Takes the options of `ServerArgs` by name, or one `server_args=` object,
        of which it keeps a copy that cannot be changed.

        Raises UnknownOptionError (a TypeError), InvalidRequestError, NotSupportedError and
        ModelLoadError (ValueErrors).
        """
        args = kwargs.pop("server_args", None)
        if args is None:
            args = ServerArgs(model_path, **{"log_level": "error", **kwargs})
        elif model_path is not None or kwargs:
            given = [*(["model_path"] if model_path is not None else []), *kwargs]
            raise UnknownOptionError(f"server_args is given; put {', '.join(given)} into it")
        elif not isinstance(args, ServerArgs):
            raise InvalidRequestError(
                f"server_args must be a jaxserve.ServerArgs, got {checks.shown(args)}"
            )
        args = args.locked()
        logging.getLogger("jaxserve").setLevel(args.log_level.upper())
        self.server_args = args
        self._home = Home()
        started = start(args)
        self._loop = started.loop
        # Collected engines stop their thread, and so does the interpreter's end: JAX is still
        # there then, because its own exit function was registered earlier.
        self._finalizer = weakref.finalize(self, self._loop.shutdown)
        atexit.register(self._finalizer)
        self._load_format, self._quantization = started.load_format, started.quantization
        self.tokenizer = started.tokenizer
        """The transformers tokenizer; None with skip_tokenizer_init=True."""
        self.tokenizer_manager = TokenizerManager(
            args, started.tokenizer, self._loop.abort, self._loop.limits, started.model_config
        )
        # What requests are encoded with is nobody else's: users may change their tokenizer.
        self._codec = started.codec
        chats: ChatPrompts | None = None
        if started.tokenizer is not None:
            reader = started.reader
            marker = None if reader is None else reader.family.marker_text
            chats = ChatPrompts.of(started.tokenizer, marker)
        self._chains = Names("transform", "engine.register")
        self._hooks = Names("hook", "engine.register_hook")
        limits = self._loop.limits
        self._prompts = PromptReader(
            limits, self._codec, chats, started.reader, args.allow_auto_truncate
        )
        self._builder = RequestBuilder(
            args,
            limits,
            started.eos_ids,
            self._codec,
            self._prompts,
            self._chains,
            self._hooks,
        )
        self._live_ids = LiveIds()
        self._request_log: RequestLog | None = None
        if args.log_requests:
            self._request_log = RequestLog(args.log_requests_level, self._codec)

    # -- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        image_data: Any = None,
        audio_data: None = None,
        video_data: None = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Continues one prompt, or each of a list.

        Returns a result dict for one prompt, a list of them for a list or with n > 1, and an
        iterator of chunks with stream=True. Closing or dropping the iterator, and Ctrl-C while
        waiting, abort the requests. Arguments are checked here, before anything is submitted:
        InvalidRequestError, NotSupportedError, UnknownOptionError; EngineShutdownError and
        EngineDeadError tell that the engine is gone.
        """
        media = {"image_data": image_data, "audio_data": audio_data, "video_data": video_data}
        given = Arguments.collect(
            media, prompt=prompt, sampling_params=sampling_params, input_ids=input_ids, **options
        )
        call, single = self._begin(given)
        if given.stream:
            return Stream(call)
        with _progress(call, given.progress) as finished:
            results = call.results(finished)
        return results[0] if single else results

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        image_data: Any = None,
        audio_data: None = None,
        video_data: None = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """`generate` for coroutines of any event loop: await it for a dict, a list, or (with
        stream=True) an async generator. Cancelling the task or closing the generator aborts the
        requests."""
        media = {"image_data": image_data, "audio_data": audio_data, "video_data": video_data}
        given = Arguments.collect(
            media, prompt=prompt, sampling_params=sampling_params, input_ids=input_ids, **options
        )
        call, single = await self._builder.off_the_loop(self._begin, given)
        if given.stream:
            return AsyncStream(call)
        with _progress(call, given.progress) as finished:
            results = await call.aresults(finished)
        return results[0] if single else results

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Answers a conversation (a list of {"role", "content"} dicts), or each of a list of them.

        The tokenizer's chat template makes the prompt; `tools` and `chat_template_kwargs` go to
        it. Images are parts of a message's content. Everything else is as in `generate`.
        """
        self._home.check()
        prompt, images = self._prompts.render_chat(messages, tools, chat_template_kwargs)
        return self.generate(prompt, sampling_params, image_data=images, **options)

    async def async_chat(
        self,
        messages: Sequence[Any],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """`chat` for coroutines, see `async_generate`."""
        self._home.check()
        prompt, images = self._prompts.render_chat(messages, tools, chat_template_kwargs)
        return await self.async_generate(prompt, sampling_params, image_data=images, **options)

    def _begin(self, given: Arguments) -> tuple[Call, bool]:
        """Checks and submits a call; whether its result is a single dict."""
        self._home.check()  # before any lock, which a forked process may never get
        inputs = self._builder.build(given)
        guides = [guide for request in inputs.requests for guide in request.guides]
        if guides:
            self._loop.apart.prepare(guides)
        args = self.server_args
        options = ResultOptions(
            codec=self._codec,
            deltas=args.stream_output,
            indexed=not inputs.single,
            return_text_in_logprobs=given.return_text_in_logprobs,
            return_prompt_token_ids=given.return_prompt_token_ids,
            enable_metrics=args.enable_metrics,
            weight_version=args.weight_version,
        )
        outputs = [Output(request, options) for request in inputs.requests]
        call = Call(
            self._loop, self._live_ids, outputs, inputs.mailbox, owner=self, log=self._request_log
        )
        return call, inputs.single

    def get_tokenizer(self) -> Any:
        """`tokenizer`: a transformers tokenizer, or None with skip_tokenizer_init=True."""
        return self.tokenizer

    # -- control ----------------------------------------------------------------------------------

    def abort_request(self, rid: str | None = "", abort_all: bool = False) -> None:
        """Ends the requests whose id starts with `rid`, or all. Their calls return what there is,
        with finish_reason type "abort". Unknown ids, "" and None are ignored. Raises
        InvalidRequestError."""
        self.tokenizer_manager.abort_request(rid, abort_all)

    def flush_cache(self) -> FlushResult:
        """Forgets cached prefixes; `.success` is False while requests are queued or running."""
        return FlushResult.of(self._loop.flush_cache())

    def get_server_info(self) -> dict[str, Any]:
        """Every option of the engine, its sizes and counters; keys in docs/api.md."""
        return info.server_info(self.server_args, self._loop.limits, self._loop.stats())

    def get_model_info(self) -> dict[str, Any]:
        """What is loaded."""
        return info.model_info(self.server_args, self._load_format, self._quantization)

    @functools.cached_property
    def metrics(self) -> CollectorRegistry:
        """The counters as a registry of prometheus_client, this engine's own:
        `prometheus_client.start_http_server(port, registry=engine.metrics)` serves it.

        Raises InvalidRequestError without enable_metrics=True, NotSupportedError without the
        `metrics` extra.
        """
        if not self.server_args.enable_metrics:
            raise InvalidRequestError("engine.metrics needs enable_metrics=True, got False")
        if importlib.util.find_spec("prometheus_client") is None:
            raise NotSupportedError(
                "engine.metrics needs the prometheus_client package: pip install jaxserve[metrics]"
            )
        from jaxserve.api import prometheus

        args = self.server_args
        return prometheus.registry(self._loop.stats, args.served_model_name or args.model_path)

    def start_profile(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        start_step: int | None = None,
        num_steps: int | None = None,
        activities: Sequence[str] | None = None,
        with_stack: bool | None = None,
        record_shapes: bool | None = None,
        profile_id: str | None = None,
        profile_prefix: str | None = None,
        profile_by_stage: bool = False,
        profile_stages: Sequence[str] | None = None,
        merge_profiles: bool = False,
    ) -> str:
        """Starts a trace of JAX's profiler, in which the loop's phases and the steps' programs
        have names; returns the folder that it will be written to. Arguments: docs/api.md.

        Raises ProfileError (a RuntimeError) while a profile runs in this process,
        InvalidRequestError, NotSupportedError.
        """
        spec = ProfileSpec.make(
            output_dir=output_dir,
            start_step=start_step,
            num_steps=num_steps,
            activities=activities,
            with_stack=with_stack,
            record_shapes=record_shapes,
            profile_id=profile_id,
            profile_prefix=profile_prefix,
            profile_by_stage=profile_by_stage,
            profile_stages=profile_stages,
            merge_profiles=merge_profiles,
        )
        self._loop.start_profile(spec)
        return spec.folder

    def stop_profile(self) -> None:
        """Ends the profile and writes it. ProfileError: there is none, or num_steps ended it."""
        self._loop.stop_profile()

    def get_all_child_pids(self) -> list[int]:
        """Always empty: jaxserve has no child processes."""
        return []

    def shutdown(self) -> None:
        """Stops the engine thread and frees the device. Calls in progress and later ones raise
        EngineShutdownError. May be called twice."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


@contextlib.contextmanager
def _progress(call: Call, shown: bool) -> Iterator[Callable[[], object]]:
    """What to call when a request has finished: it moves a bar if one is to be shown."""
    if not shown:
        yield lambda: None
        return
    with Bar(total=call.size, desc="Requests", unit="req") as bar:
        yield bar.update
