"""An engine without a model for tests of batch jobs: it answers at once, with what it was asked."""

from __future__ import annotations

import sys
import types

from jaxserve.errors import InvalidRequestError


class EchoEngine:
    """The part of `jaxserve.Engine` that jobs use. The prompt "broken" is refused, as the image
    "broken.png" is; a call with it fails as a whole, as the engine's do."""

    started = 0

    def __init__(self, server_args):
        type(self).started += 1
        self.server_args = server_args

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.shutdown()

    def shutdown(self):
        pass

    def generate(self, prompt=None, sampling_params=None, input_ids=None):
        values = prompt if input_ids is None else input_ids
        if isinstance(values, list) and not isinstance(values[0], int):
            return [self._one(*row) for row in zip(values, sampling_params, strict=True)]
        return self._one(values, sampling_params)

    def chat(self, messages, sampling_params=None):
        if isinstance(messages[0], list):
            return [self._one(*row) for row in zip(messages, sampling_params, strict=True)]
        return self._one(messages, sampling_params)

    async def async_generate(
        self, prompt=None, sampling_params=None, input_ids=None, image_data=()
    ):
        if "broken.png" in image_data:
            raise InvalidRequestError("image_data[0][0] is 'broken.png'")
        answer = self.generate(prompt, sampling_params, input_ids)
        if image_data:
            answer["text"] += f"|{image_data}"
        return answer

    async def async_chat(self, messages, sampling_params=None):
        return self.chat(messages, sampling_params)

    def _one(self, value, params):
        if value == "broken":
            raise InvalidRequestError(f"prompt is {value!r}")
        meta = {
            "finish_reason": {"type": "length", "length": 2},
            "prompt_tokens": len(value),
            "completion_tokens": 2,
            "cached_tokens": 1,
        }
        return {"text": f"{value}|{params}", "output_ids": [1, 2], "meta_info": meta}


def install():
    """In place of `jaxserve.engine`, which would load JAX. For processes that only do this."""
    module = types.ModuleType("jaxserve.engine")
    module.Engine = EchoEngine  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["jaxserve.engine"] = module
