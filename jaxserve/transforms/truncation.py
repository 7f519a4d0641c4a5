"""Filters by probability: which tokens of a distribution are left to draw from.

Each leaves the logits of those that it keeps bitwise as they are, and makes the others -inf. They
see logits before the request's temperature; `temperature` in front of them in a chain changes that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve import checks
from jaxserve.transforms.context import Context
from jaxserve.transforms.selection import largest, smallest_with_mass
from jaxserve.transforms.transform import Params, Ranges, State, Transform

MOST_SURPRISE = 128.0
"""Nats, a power of two: float32 has no probability as small as e ** -128."""
LEAST_MASS = 1e-30
"""In place of a mass of 0, so that one token has it; XLA may take smaller numbers for 0."""


def min_p() -> Transform:
    """Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs". As the sampling parameter of this name, at another place of the chain.

    `min_p` (0.0): tokens at least this likely stay, in shares of the likeliest one; 0 is all.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.top(logits)
        return _kept(logits >= top + jnp.log(params["min_p"]), logits, top)

    return _filter(apply, {"min_p": 0.0}, {"min_p": (0, 1)})


def epsilon_cutoff() -> Transform:
    """Hewitt et al. 2022, "Truncation Sampling as Language Model Desmoothing": epsilon sampling.

    `epsilon_cutoff` (0.0): tokens at least this likely stay, and the likeliest; 0 is all.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.top(logits)
        return _kept(jnp.exp(_log_p(logits, top)) >= params["epsilon_cutoff"], logits, top)

    return _filter(apply, {"epsilon_cutoff": 0.0}, {"epsilon_cutoff": (0, 1)})


def eta_cutoff() -> Transform:
    """Hewitt et al. 2022, "Truncation Sampling as Language Model Desmoothing": eta sampling.

    `eta_cutoff` (0.0): the paper's epsilon. Tokens at least min(epsilon, sqrt(epsilon) exp(-H))
    likely stay, H the entropy in nats, and the likeliest; 0 is all.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.top(logits)
        log_p = _log_p(logits, top)
        epsilon = params["eta_cutoff"]
        eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_information(log_p).sum()))
        return _kept(jnp.exp(log_p) >= eta, logits, top)

    return _filter(apply, {"eta_cutoff": 0.0}, {"eta_cutoff": (0, 1)})


def typical_p() -> Transform:
    """Meister et al. 2022, "Locally Typical Sampling".

    `typical_p` (1.0): the mass of what stays, tokens whose surprise is nearest to the entropy
    first. The token that crosses it stays, and those exactly as typical as it, as in Hugging
    Face's `TypicalLogitsWarper`; 1 is all.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        log_p = _log_p(logits, context.top(logits))
        entropy = _information(log_p).sum()
        mass = params["typical_p"]

        def judge(log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.abs(-log_p - entropy) / MOST_SURPRISE, jnp.exp(log_p)

        kept = smallest_with_mass(log_p, judge, jnp.maximum(mass, LEAST_MASS))
        return jnp.where(kept | (mass >= 1), logits, -jnp.inf)

    return Transform(apply, params={"typical_p": 1.0}, ranges={"typical_p": (0, 1)})


def top_n_sigma() -> Transform:
    """Tang et al. 2024, "Top-n sigma: Not All Logits Are You Need".

    `top_n_sigma` (0.0): tokens stay whose logits are at most so many standard deviations below the
    largest; 0 is all. The deviation is that of the whole vocabulary, without tokens that are -inf
    already. What stays does not depend on a temperature.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.top(logits)
        sigma = jnp.std(logits, where=logits > -jnp.inf)
        sigmas = params["top_n_sigma"]
        return _kept((logits >= top - sigmas * sigma) | (sigmas <= 0), logits, top)

    return _filter(apply, {"top_n_sigma": 0.0}, {"top_n_sigma": (0, None)})


def top_h(candidates: int = 100) -> Transform:
    """Potraghloo et al. 2025, "Top-H Decoding: Adapting the Creativity and Coherence with Bounded
    Entropy in Text Generation", as Hugging Face's `TopHLogitsWarper` has it: of the most likely
    `candidates` tokens as a distribution, one after the other stays while the sum of their
    -p log p is at most a share of the entropy. Equally likely ones come in the order of their ids.

    `top_h` (1.0): that share, the paper's alpha; 1 is all tokens, beyond the candidates too.
    """
    checks.integer("candidates", candidates, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        values, ids = largest(logits, min(candidates, logits.shape[0]))
        log_p = jax.nn.log_softmax(values)
        sums = jnp.cumsum(_information(log_p))
        share = params["top_h"]
        kept = (sums <= share * sums[-1]) & (jnp.exp(log_p) > 0)
        kept = kept.at[0].set(True)
        few = jnp.full_like(logits, -jnp.inf).at[ids].set(jnp.where(kept, values, -jnp.inf))
        return jnp.where(share >= 1, logits, few)

    return Transform(apply, params={"top_h": 1.0}, ranges={"top_h": (0, 1)})


def mirostat() -> Transform:
    """Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
    Perplexity", the second version, as llama.cpp has it: tokens of at most mu bits of surprise
    stay, and the likeliest; mu, at first twice the target, goes down when the token drawn was more
    surprising than the target among those that stayed, after the temperature, and up when less.

    `mirostat_tau` (5.0): the target, in bits. `mirostat_eta` (0.1): bits of mu for one of error.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.top(logits)
        return _kept(-_log_p(logits, top) / math.log(2.0) <= state, logits, top)

    def init(params: Params) -> State:
        return 2.0 * params["mirostat_tau"]

    def observe(state: State, params: Params, token: jax.Array, logprob: jax.Array) -> State:
        error = -logprob / math.log(2.0) - params["mirostat_tau"]
        return state - params["mirostat_eta"] * error

    defaults = {"mirostat_tau": 5.0, "mirostat_eta": 0.1}
    ranges = dict.fromkeys(defaults, (0, None))
    return Transform(apply, init, observe, defaults, ranges, keeps_top=True)


def xtc(tag: int = 0x787463) -> Transform:
    """Exclude Top Choices (p-e-w 2024, text-generation-webui's pull request 6335; llama.cpp): of
    the tokens at least as likely as a threshold all but the least likely go, sometimes. Of equally
    likely ones the last stays. `tag` names the coin, see `Context.uniform`.

    `xtc_probability` (0.0): how often; 0 is never. `xtc_threshold` (0.1): a probability. Above 0.5
    there is never a second token to be left.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        likely = jax.nn.softmax(logits) >= params["xtc_threshold"]
        above = likely & (logits > -jnp.inf)  # a threshold of 0 is for tokens that can be drawn
        least = jnp.where(above, logits, jnp.inf).min()
        ids = jnp.arange(logits.shape[0])
        last = jnp.where(above & (logits == least), ids, -1).max()
        now = context.uniform(tag) < params["xtc_probability"]
        return jnp.where(now & above & (ids != last), -jnp.inf, logits)

    defaults = {"xtc_probability": 0.0, "xtc_threshold": 0.1}
    return Transform(apply, params=defaults, ranges=dict.fromkeys(defaults, (0, 1)))


def _filter(apply: Callable[..., jax.Array], params: Params, ranges: Ranges) -> Transform:
    """One without a state that keeps the likeliest token."""
    return Transform(apply, params=params, ranges=ranges, keeps_top=True)


def _kept(kept: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
    """Only those tokens, and in any case the likeliest. top: their largest logit."""
    return jnp.where(kept | (logits == top), logits, -jnp.inf)


def _log_p(logits: jax.Array, top: jax.Array) -> jax.Array:
    """`jax.nn.log_softmax` of logits whose largest is known."""
    shifted = logits - top
    return shifted - jnp.log(jnp.exp(shifted).sum())


def _information(log_p: jax.Array) -> jax.Array:
    """-p log p of each token, whose sum is the entropy, in nats."""
    p = jnp.exp(log_p)
    return -jnp.where(p > 0, p * log_p, 0.0)
