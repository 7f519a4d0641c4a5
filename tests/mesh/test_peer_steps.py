"""What an engine does so that kernels which wait for other devices never do so in vain.

The kernels themselves need GPUs; here `comm` is an array that nobody reads.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxserve
from jaxserve.parallel.mesh import TENSOR
from jaxserve.parallel.peers import Peers
from jaxserve.step import runner as runner_module
from pallas_kernels.all_reduce.workspace import COMM_WORDS
from tests import inside, test_chains
from tests.marks import long
from tests.mesh.cases import CASES, OPTIONS
from tests.prompts import ids


class Pretended(Peers):
    """Peers with arrays in place of a workspace, and with what went wrong, if anything."""

    wrong: str | None = None

    def error(self):
        return self.wrong


@pytest.fixture
def runs(monkeypatch):
    """Every run of a program: (executable, "quiet", "comm" or ""), in order."""
    seen = []

    def connect(mesh, size, dtype):
        if mesh.size == 1:
            return real(mesh, size, dtype)
        sharding = NamedSharding(mesh, PartitionSpec(TENSOR))
        arrays = [
            jax.device_put(np.full((mesh.size, COMM_WORDS), n, np.int32), sharding) for n in (1, -1)
        ]
        peers = Pretended("peer", "pretended")
        monkeypatch.setattr(Pretended, "comm", arrays[0])
        monkeypatch.setattr(Pretended, "quiet", arrays[1])
        return peers

    real = runner_module.connect
    queue = runner_module.Runner._queue

    def recorded(self, key, executable, given):
        result = queue(self, key, executable, given)
        names = self._catalogue[key[0]].arguments
        comm = given.get("comm", self._arrays["comm"]) if "comm" in names else None
        how = "" if comm is None else "quiet" if comm is Pretended.quiet else "comm"
        seen.append((key, executable, how))
        return result

    monkeypatch.setattr(runner_module, "connect", connect)
    monkeypatch.setattr(runner_module.Runner, "_queue", recorded)
    return seen


def quiet_first(runs):
    """The kinds of programs of which each executable has run quietly, once, and before it counted;
    there are no others that sum."""
    known = set()
    for key, executable, how in runs:
        if how == "quiet":
            assert id(executable) not in known, key
            known.add(id(executable))
        elif how == "comm":
            assert id(executable) in known, key
    return {key[0] for key, _, how in runs if how}


@pytest.mark.parametrize("precompile", [long(False), True])
def test_every_step_has_run_quietly_before_it_counts(tiny_models, runs, precompile):
    names = ("seeded", "logprobs", "samples", "chunks")
    folder = tiny_models("llama")
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        expected = [ids(engine.generate(**CASES[name])) for name in names]
    assert {how for _, _, how in runs} == {""}  # one device has nobody to wait for
    runs.clear()
    options = {**OPTIONS, "tp_size": 2, "precompile": precompile}
    with jaxserve.Engine(folder, **options) as engine:
        assert [ids(engine.generate(**CASES[name])) for name in names] == expected
        info = engine.get_server_info()
        assert info["late_compiles"] == 0 and info["all_reduce"] == "peer: pretended"
    kinds = quiet_first(runs)
    assert {"extend", "decode"} == kinds
    assert {key[0] for key, _, how in runs if not how} >= {"prompt_logprobs", "copy_pages"}


def test_a_quiet_run_changes_only_padding(tiny_models, runs):
    """Whatever its kernels return: here they compute as ever."""
    with jaxserve.Engine(tiny_models("llama"), tp_size=2, **OPTIONS) as engine:
        engine.generate(**CASES["seeded"])
        test_chains.register(engine, fuse=True)
        engine.generate(input_ids=[[5, 6], [7]], sampling_params=test_chains.asks(3))
        lab = engine.lab(max_tokens=48)
        handles = lab.step(lab.prefill([[5, 6, 7]]).handles, [8]).handles
        lab.branch(handles[0], 2).step([8, 9])
        runner = inside.runner(engine)
        padding = runner.config.program.max_rows

        def run_all():
            before = jax.tree.map(np.asarray, kept())
            for key, executable in runner.programs.present():
                if nobody := runner._nobody(key):
                    kinds.add(key[0])
                    runner._queue(key, executable, nobody)
            return before, jax.tree.map(np.asarray, kept())

        def kept():
            arrays = runner._arrays
            own = [name for name in arrays if name.startswith("state of ")]
            slots = {name: arrays[name] for name in ("progress", "sampled", "row_params", *own)}
            return arrays["cache"], jax.tree.map(lambda x: x[:padding], slots)

        kinds: set[str] = set()
        before, after = engine._loop.call(run_all)
    fused = {kind for kind in kinds if kind.startswith("decode_sample_")}
    assert kinds == {"extend", "decode", "lab_step", "lab_branch", *fused} and len(fused) == 1
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_program_that_replaces_another_runs_quietly_too(tiny_models, runs):
    with jaxserve.Engine(tiny_models("llama"), tp_size=2, **OPTIONS) as engine:
        first = ids(engine.generate(**CASES["greedy"]))
        runs.clear()
        engine._loop.call(inside.runner(engine).programs._compiled.clear)
        assert engine.flush_cache().success
        assert ids(engine.generate(**CASES["greedy"])) == first
    assert {"extend", "decode"} == quiet_first(runs)


def test_a_device_that_gives_up_ends_the_engine_with_its_cause(tiny_models, runs, monkeypatch):
    told = "an all-reduce was given up after 3 s: rank 0 waited for 1"
    monkeypatch.setattr("jaxserve.loop.SUSPICIOUS_SECONDS", -1.0)
    with jaxserve.Engine(tiny_models("llama"), tp_size=2, **OPTIONS) as engine:
        engine.generate(**CASES["greedy"])
        monkeypatch.setattr(Pretended, "wrong", told)
        with pytest.raises(jaxserve.EngineDeadError, match=told):
            engine.generate(**CASES["greedy"])
        with pytest.raises(jaxserve.EngineDeadError, match=told):
            engine.generate(**CASES["greedy"])
    monkeypatch.setattr(Pretended, "wrong", None)
    with jaxserve.Engine(tiny_models("llama"), tp_size=2, **OPTIONS) as engine:
        assert engine.generate(**CASES["greedy"])
