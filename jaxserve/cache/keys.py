"""Names of token prefixes, page by page: digests, each of the one before and a page's tokens. Host
only, no jax.

128 bits of BLAKE2: two prefixes of different tokens or namespaces never share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

DIGEST_BYTES = 16


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
