"""Programs written for SGLang, run unchanged on jaxserve: docs/from_sglang.md.

`python -m tests.clients [NAME ...]` makes each an environment of its own and runs its check.
"""
