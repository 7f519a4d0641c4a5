"""Names of token prefixes, page by page: digests, each of the one before and a page's tokens. Host
only, no jax.

What stands for a token here, in the radix tree and in host memory is its key
(`batch.Sequence.keys`), an int32: two tokens of one key, behind prefixes of equal keys in the same
namespace, have the same KV. 128 bits of BLAKE2: prefixes of different keys or namespaces never
share a digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

DIGEST_BYTES = 16


def namespace_of(**parts: str) -> str:
    """The namespace of requests whose KV depends on `parts` beside their tokens, by name: a cache
    salt, say, or an adapter. Different parts make different names; empty ones are none."""
    given = sorted((name, value) for name, value in parts.items() if value)
    return "".join([f"{name}={len(value)}:{value};" for name, value in given])


def namespace_key(namespace: str) -> bytes:
    """The key of the empty prefix."""
    name = namespace.encode("utf-8", "surrogatepass")
    return blake2b(name, digest_size=DIGEST_BYTES, person=b"namespace").digest()


def chain(key: bytes, tokens: bytes, page_bytes: int) -> Iterator[bytes]:
    """The keys of the prefixes that end with each whole page of `tokens`, which come behind the
    prefix of `key`."""
    for end in range(page_bytes, len(tokens) + 1, page_bytes):
        page = tokens[end - page_bytes : end]
        key = blake2b(key + page, digest_size=DIGEST_BYTES).digest()
        yield key
