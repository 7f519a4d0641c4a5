"""SGLang's engine methods that jaxserve does not support yet. Each says so when called."""

from __future__ import annotations

from typing import Any, NoReturn

from jaxserve.errors import NotSupportedError


class UnsupportedMethods:
    """The methods with upstream's argument names. All raise NotSupportedError (a ValueError)."""

    def encode(
        self,
        prompt: Any,
        image_data: Any = None,
        audio_data: Any = None,
        video_data: Any = None,
        dimensions: int | None = None,
        lora_path: Any = None,
        embed_override_token_id: int | None = None,
        embed_overrides: Any = None,
        external_trace_header: Any = None,
        rid: Any = None,
    ) -> NoReturn:
        """Embeddings of prompts."""
        _refuse("encode")

    async def async_encode(self, prompt: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """`encode` in a coroutine."""
        _refuse("async_encode")

    def rerank(self, prompt: list[list[str]]) -> NoReturn:
        """Scores of (query, document) pairs."""
        _refuse("rerank")

    def score(
        self,
        query: Any = None,
        items: Any = None,
        label_token_ids: list[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
        **kwargs: Any,
    ) -> NoReturn:
        """Probabilities of label tokens after query and item."""
        _refuse("score")

    async def async_score(self, query: Any = None, items: Any = None, **kwargs: Any) -> NoReturn:
        """`score` in a coroutine."""
        _refuse("async_score")

    def open_session(
        self,
        capacity_of_str_len: int,
        session_id: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> NoReturn:
        """Server-side conversation state."""
        _refuse("open_session")

    def close_session(self, session_id: str) -> NoReturn:
        """Ends a session."""
        _refuse("close_session")

    def start_expert_distribution_record(self) -> NoReturn:
        """Mixture-of-experts statistics."""
        _refuse("start_expert_distribution_record")

    def stop_expert_distribution_record(self) -> NoReturn:
        """Mixture-of-experts statistics."""
        _refuse("stop_expert_distribution_record")

    def dump_expert_distribution_record(self) -> NoReturn:
        """Mixture-of-experts statistics."""
        _refuse("dump_expert_distribution_record")

    def update_weights_from_disk(self, model_path: str, load_format: str | None = None) -> NoReturn:
        """Replaces the weights by a checkpoint's."""
        _refuse("update_weights_from_disk")

    def update_weights_from_tensor(
        self,
        named_tensors: list[tuple[str, Any]],
        load_format: str | None = None,
        flush_cache: bool = True,
    ) -> NoReturn:
        """Replaces weights by arrays under Hugging Face names."""
        _refuse("update_weights_from_tensor")

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
        load_format: str | None = None,
    ) -> NoReturn:
        """Receives weights from a process group."""
        _refuse("update_weights_from_distributed")

    def update_weights_from_ipc(
        self, zmq_handles: dict[str, str], flush_cache: bool = True
    ) -> NoReturn:
        """Receives weights from another process."""
        _refuse("update_weights_from_ipc")

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
    ) -> NoReturn:
        """Joins a process group for weight updates."""
        _refuse("init_weights_update_group")

    def destroy_weights_update_group(self, group_name: str) -> NoReturn:
        """Leaves a process group."""
        _refuse("destroy_weights_update_group")

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> NoReturn:
        """Values of one weight."""
        _refuse("get_weights_by_name")

    def release_memory_occupation(self, tags: list[str] | None = None) -> NoReturn:
        """Frees KV cache and weights."""
        _refuse("release_memory_occupation")

    def resume_memory_occupation(self, tags: list[str] | None = None) -> NoReturn:
        """Allocates KV cache and weights again."""
        _refuse("resume_memory_occupation")

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> NoReturn:
        """Registers a LoRA adapter."""
        _refuse("load_lora_adapter")

    async def async_load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False
    ) -> NoReturn:
        """`load_lora_adapter` in a coroutine."""
        _refuse("async_load_lora_adapter")

    def load_lora_adapter_from_tensors(
        self, lora_name: str, tensors: Any, config_dict: Any, load_format: str | None = None
    ) -> NoReturn:
        """Registers a LoRA adapter from arrays."""
        _refuse("load_lora_adapter_from_tensors")

    def unload_lora_adapter(self, lora_name: str) -> NoReturn:
        """Removes a LoRA adapter."""
        _refuse("unload_lora_adapter")

    async def async_unload_lora_adapter(self, lora_name: str) -> NoReturn:
        """`unload_lora_adapter` in a coroutine."""
        _refuse("async_unload_lora_adapter")

    def pause_generation(self, mode: str = "retract") -> NoReturn:
        """Holds all running requests."""
        _refuse("pause_generation")

    def continue_generation(self) -> NoReturn:
        """Lets paused requests go on."""
        _refuse("continue_generation")

    def freeze_gc(self) -> NoReturn:
        """Moves live objects out of the garbage collector's sight."""
        _refuse("freeze_gc")

    def collective_rpc(self, method: str, **kwargs: Any) -> NoReturn:
        """Calls a method of every scheduler process."""
        _refuse("collective_rpc")

    def save_remote_model(self, **kwargs: Any) -> NoReturn:
        """Saves weights to a remote store."""
        _refuse("save_remote_model")

    def save_sharded_model(self, **kwargs: Any) -> NoReturn:
        """Saves each rank's weights."""
        _refuse("save_sharded_model")


def _refuse(method: str) -> NoReturn:
    raise NotSupportedError(f"Engine.{method} is not supported yet")
