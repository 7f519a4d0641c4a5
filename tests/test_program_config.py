"""What a stored program is named by: all that changes a program, and nothing else."""

from __future__ import annotations

import dataclasses

import jax
import pytest

import converters
from jaxserve.config import EngineConfig, HostMemory, ProgramConfig, States
from jaxserve.config.media import MediaSizes, Pictures
from jaxserve.machine import DeviceMemory
from jaxserve.media.normal import Normal
from jaxserve.packing.buckets import Buckets
from jaxserve.parallel.mesh import mesh_of, replicated
from jaxserve.scheduler.policy import Policy
from jaxserve.server_args import ServerArgs
from jaxserve.step.precompile import Precompilation
from jaxserve.step.runner import Runner
from jaxserve.step.xla_options import xla_options
from tests.machines import CPU, GPU

OPTIONS = {
    "context_length": 128, "max_running_requests": 4, "max_total_tokens": 512,
    "num_continuous_decode_steps": 2,
}  # fmt: skip
MESH = mesh_of(jax.devices()[0])
KEYS = [("decode", 2), ("decode_many", 2), ("extend", 64)]
OF_ARGUMENTS_AND_CODE = {
    "crossovers": GPU.crossovers,
    "page_size": 8,
    "table_width": 4,
    "max_rows": 3,
    "steps_per_dispatch": 3,
    "kv_cache_dtype": "fp8_e4m3",
    "bias_capacity": 7,
    "max_logprob_ids": 5,
    "max_top_logprobs": 6,
    "raw_logprobs": True,
}
OF_OTHER_KINDS = {"platform": "gpu", "deterministic": True, "attention": "triton"}


class Made:
    """What a runner with `config` would compile."""

    def __init__(self, config: EngineConfig, loaded: converters.LoadedModel, folder: str):
        copies = {name: array.copy() for name, array in loaded.params.items()}
        config = dataclasses.replace(config, program_folder=folder)
        with pytest.MonkeyPatch.context() as patch:  # names and texts are all that is wanted
            for when in ("first", "rest"):
                patch.setattr(Precompilation, when, lambda self: None)
            self.runner = Runner(config, dataclasses.replace(loaded, params=copies), MESH)
        self.programs = self.runner.programs

    def name(self, key):
        """Of the file in which the program is stored."""
        _, arguments, donated = self.programs._builder(key)
        options = self.programs._options(key[1])
        return self.programs._stored.name(key[0], arguments, donated, options)

    def text(self, key):
        """The program as it is lowered, arguments and their donation included."""
        function, arguments, donated = self.programs._builder(key)
        return jax.jit(function, donate_argnums=donated).lower(*arguments).as_text()


@pytest.fixture(scope="module")
def loaded(tiny_models):
    return converters.load(tiny_models("llama"), sharding=replicated(MESH))


@pytest.fixture(scope="module")
def config(loaded):
    return EngineConfig.resolve(ServerArgs("x", **OPTIONS), loaded.config, CPU, 1 << 20)


@pytest.fixture(scope="module")
def base(config, loaded, tmp_path_factory):
    return Made(config, loaded, tmp_path_factory.mktemp("programs"))


def test_every_field_is_looked_at():
    names = {field.name for field in dataclasses.fields(ProgramConfig)}
    assert names == {*OF_ARGUMENTS_AND_CODE, *OF_OTHER_KINDS}


@pytest.mark.parametrize("name", OF_ARGUMENTS_AND_CODE)
def test_another_value_is_another_program_of_another_name(name, base, config, loaded, tmp_path):
    program = dataclasses.replace(config.program, **{name: OF_ARGUMENTS_AND_CODE[name]})
    made = Made(dataclasses.replace(config, program=program), loaded, tmp_path)
    key = ("decode_many", 2)
    assert made.text(key) != base.text(key)
    assert made.name(key) != base.name(key)


def test_the_platform_and_determinism_are_options_of_the_compiler(config):
    gpu = dataclasses.replace(config.program, platform="gpu")
    fixed = dataclasses.replace(gpu, deterministic=True)
    compiled = [xla_options(program, 8) for program in (config.program, gpu, fixed)]
    assert compiled[0] != compiled[1] != compiled[2]
    assert len({repr(program) for program in (config.program, gpu, fixed)}) == 3


def test_another_attention_is_another_kernel(base, config, loaded, tmp_path):
    """One that a CPU does not have."""
    program = dataclasses.replace(config.program, attention="triton")
    made = Made(dataclasses.replace(config, program=program, precompile=False), loaded, tmp_path)
    assert made.name(KEYS[0]) != base.name(KEYS[0])
    with pytest.raises(NotImplementedError, match="triton: needs a CUDA device"):
        made.text(KEYS[0])


PICTURES = Pictures(4, 16, 1, 1, 0.1, Normal(1 / 255, (0.5,), (0.5,)), 0)


def test_what_concerns_the_host_changes_no_program(base, config, loaded, tmp_path):
    others = {
        "buckets": Buckets((1, 2, 3), (64, 96)),
        "states": States("full", (0, 2), logits=True),
        "max_state_bytes": 99,
        "context_length": 64,
        "chunk_alignment": 16,
        "max_prefill_tokens": 100,
        "max_prefill_rows": 2,
        "max_queued": 9,
        "overlap": not config.overlap,
        "precompile": not config.precompile,
        "wait_until_compiled": not config.wait_until_compiled,
        "max_total_tokens": 527,  # as many pages
        "num_pages": base.runner.num_pages,
        "mem_fraction": 0.5,
        "memory": DeviceMemory(0.5, 0.1),
        "log_interval": 3,
        "policy": Policy("lpm"),
        "pace": None,
        "radix_eviction": "lfu",
        "host": HostMemory(1.0, 1 << 24),
        "media": MediaSizes(PICTURES, 64, 16, (4,), 4),
        "program_folder": tmp_path,
    }
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields - {"program"} == set(others)
    assert all(getattr(config, name) != value for name, value in others.items())
    made = Made(dataclasses.replace(config, **others), loaded, tmp_path)
    assert made.runner.config.program == base.runner.config.program
    for key in KEYS:
        assert made.name(key) == base.name(key)
        assert made.text(key) == base.text(key)
