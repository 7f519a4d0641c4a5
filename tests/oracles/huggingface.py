"""Greedy decoding and logprobs by the Hugging Face torch model, float32, no tricks."""

from __future__ import annotations

import numpy as np
import torch
import transformers

TIE = 1e-4
"""Two logits closer than this may come out in either order."""


class Reference:
    """A checkpoint folder's model on the CPU."""

    def __init__(self, folder: str):
        torch.set_num_threads(2)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), V] float32."""
        return self.model(torch.tensor([ids])).logits[0].float()

    @torch.no_grad()
    def hidden_states(self, ids: list[int]) -> list[np.ndarray]:
        """[len(ids), D] float32 of the embeddings, between layers, and after the final norm."""
        found = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return [each[0].float().numpy() for each in found]

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.logits(ids), dim=-1)

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        """A plain argmax loop over the cached model: no EOS, no processors."""
        out: list[int] = []
        step = self.model(torch.tensor([ids]), use_cache=True)
        for _ in range(count):
            out.append(int(step.logits[0, -1].argmax()))
            if len(out) < count:
                step = self.model(
                    torch.tensor([[out[-1]]]), past_key_values=step.past_key_values, use_cache=True
                )
        return out

    def assert_greedy(self, prompt: list[int], output: list[int]) -> None:
        """`output` is the greedy continuation; where it leaves the argmax loop, the two logits must
        be tied, and the rest is checked as the greedy continuation of what was output."""
        logits = self.logits(prompt + output)
        for i, token in enumerate(output):
            row = logits[len(prompt) + i - 1]
            assert row.max() - row[token] <= TIE, (i, token, int(row.argmax()))
