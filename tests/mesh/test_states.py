"""Hidden states and logits of a model that is cut over devices, in replicas: as on one device."""

from __future__ import annotations

import numpy as np

import jaxserve
from tests.mesh.cases import OPTIONS, PROMPTS, SEEDED
from tests.oracles.huggingface import Reference

STATES = {
    "enable_return_hidden_states": True,
    "hidden_state_layers": [0, 1, 2],
    "enable_return_logits": True,
}
PARAMS = {**SEEDED, "max_new_tokens": 6}


def test_two_replicas_of_two_devices_each(tiny_models):
    """Between layers, each device has a part of the stream's last sum."""
    folder = tiny_models("qwen3")
    reference = Reference(folder)
    values = [(True, "last")[number % 2] for number in range(len(PROMPTS))]
    with jaxserve.Engine(folder, dp_size=2, tp_size=2, **OPTIONS, **STATES) as engine:
        results = engine.generate(
            input_ids=PROMPTS,
            sampling_params=PARAMS,
            return_hidden_states=values,
            return_logits=values,
        )
        assert engine.get_server_info()["late_compiles"] == 0
    assert {result["meta_info"]["dp_rank"] for result in results} == {0, 1}
    for prompt, value, result in zip(PROMPTS, values, results, strict=True):
        ids, meta = prompt + result["output_ids"][:-1], result["meta_info"]
        expected = reference.hidden_states(ids)
        logits = reference.logits(ids).numpy()[len(prompt) - 1 :]
        for index, found in meta["layer_hidden_states"].items():
            rows = np.vstack(found) if value is True else found[None]
            wanted = expected[index][-len(rows) :]
            errors = np.linalg.norm(rows - wanted, axis=1)
            assert (errors <= 1e-4 * np.linalg.norm(wanted, axis=1)).all()
            assert len(rows) == (len(ids) if value is True else 1)
        np.testing.assert_array_equal(meta["hidden_states"][-1], meta["layer_hidden_states"][2][-1])
        found = np.vstack(meta["logits"]) if value is True else meta["logits"][None]
        np.testing.assert_allclose(found, logits[-len(found) :], atol=1e-4)
        assert len(found) == (6 if value is True else 1)
