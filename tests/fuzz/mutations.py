"""Model files, each with one fault or one harmless change, for `python -m tests.fuzz.files`.

    mutant = mutate(random.Random(7), bases, folder)

Structure-aware: headers, indexes, configs, tokenizers and GGUF tables are parsed, changed and
written again, so that a change reaches the code behind the parser; some are bytes at random.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import gguf_layout

DEEP = "@@deep@@"
DEPTH = 100_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**9, 10**400,
    0.0, 0.5, -0.5, 1e-30, 1e38, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "auto", "../../x", "/etc/hostname", "\ud800", "\0", "a" * 100_000, "true", "1",
    [], {}, [[]], [None], [0], ["x"], {"a": {}}, {"": []}, DEEP,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    path: Path
    """What to load: a folder, or a GGUF file."""
    target: str
    """The kind of file that was changed."""
    how: str
    """The change, in words."""


def mutate(rng: random.Random, bases: dict[str, Path], folder: Path) -> Mutant:
    """Copies one of `bases` ("folder": sharded safetensors, "gguf": a file) into `folder`, which
    does not exist, with one change."""
    target = rng.choices(tuple(_TARGETS), _WEIGHTS)[0]
    folder.mkdir()
    if target == "gguf":
        path = folder / "model.gguf"
        layout = gguf_layout.parse(bases["gguf"].read_bytes())
        how = rng.choice(_GGUF)(rng, layout)
        path.write_bytes(_damage(rng, layout.to_bytes(), how))
        return Mutant(path, target, how)
    shutil.copytree(bases["folder"], folder, dirs_exist_ok=True)
    return Mutant(folder, target, _TARGETS[target](rng, folder))


# -- JSON ------------------------------------------------------------------------------------------


def change_json(rng: random.Random, value: Any) -> str:
    """Changes the JSON tree `value`, an object, in place; returns what was done."""
    if rng.random() < 0.15:
        return _harmless_json(rng, value)
    where, holder = _walk(rng, value)
    if not holder:
        holder["added"] = rng.choice(VALUES)
        return f"{where} gets a key"
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    old = holder[key]
    where = f"{where}.{key}"[:80]
    kind = rng.choice(("replace", "replace", "replace", "delete", "wrap", "number", "rename"))
    if kind == "number" and isinstance(old, (int, float)):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old * 10**6, old / 3))
        return f"{where}: {old} becomes {holder[key]}"
    if kind == "delete":
        del holder[key]
        return f"{where} is left out"
    if kind == "wrap":
        holder[key] = rng.choice(([old], {"a": old}, [old, old]))
        return f"{where} is wrapped"
    if kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return f"{where} is renamed"
    holder[key] = rng.choice(VALUES)
    return f"{where} becomes {str(holder[key])[:30]!r}"


def _harmless_json(rng: random.Random, value: dict[str, Any]) -> str:
    if rng.random() < 0.5:
        items = list(value.items())
        rng.shuffle(items)
        value.clear()
        value.update(items)
        return "keys in another order"
    value["a_key_nobody_knows"] = rng.choice((1, "x", [1, 2], {"a": None}, 0.5))
    return "one key more"


def _walk(rng: random.Random, value: Any) -> tuple[str, Any]:
    where, steps = "", 0
    while steps < 8:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        deeper = [(key, item) for key, item in inner if isinstance(item, (dict, list)) and item]
        if not deeper or rng.random() < 0.4:
            break
        key, value = rng.choice(deeper)
        where, steps = f"{where}.{key}", steps + 1
    return where[:60], value


def to_json(value: Any) -> bytes:
    """With the marker of deep nesting written out."""
    return json.dumps(value).replace(f'"{DEEP}"', "[" * DEPTH + "]" * DEPTH).encode()


def _json_file(name: str) -> Callable[[random.Random, Path], str]:
    def change(rng: random.Random, folder: Path) -> str:
        path = folder / name
        value = json.loads(path.read_bytes())
        how = change_json(rng, value)
        path.write_bytes(_damage(rng, to_json(value), how))
        return f"{name}: {how}"

    return change


def _damage(rng: random.Random, data: bytes, how: str) -> bytes:
    """One file in twelve is also damaged blindly."""
    return _blindly(rng, data)[0] if rng.random() < 1 / 12 else data


def _blindly(rng: random.Random, data: bytes, head: int | None = None) -> tuple[bytes, str]:
    """head: where the interesting bytes end."""
    kind = rng.choice(("flip", "flip", "cut", "insert", "empty", "more"))
    end = min(head or len(data), len(data))
    at = rng.randrange(max(end, 1))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(end)] = rng.randrange(256)
        return bytes(changed), "bytes flipped"
    if kind == "cut":
        return data[:at], f"cut at {at}"
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:], f"bytes put in at {at}"
    if kind == "empty":
        return b"", "emptied"
    return data + rng.randbytes(rng.randint(1, 5000)), "bytes appended"


# -- safetensors -----------------------------------------------------------------------------------


def _safetensors(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    harmless = ("metadata", "order", "ignored", "swap", "values", "pad")
    kind = rng.choice((*harmless, *("json", "json", "offsets", "blind", "length") * 2))
    text = None
    if kind == "metadata":
        header["__metadata__"] = rng.choice(VALUES)
    elif kind == "order":
        header = dict(sorted(header.items(), key=lambda _: rng.random()))
    elif kind == "ignored":
        end = len(body)
        header["model.rotary_emb.inv_freq"] = {
            "dtype": rng.choice(("F32", "I8")), "shape": [4], "data_offsets": [end, end + 16],
        }  # fmt: skip
        if header["model.rotary_emb.inv_freq"]["dtype"] == "I8":
            header["model.rotary_emb.inv_freq"]["shape"] = [16]
        body += bytes(16)
    elif kind == "swap":
        one, other = rng.sample(names, 2)
        header[one], header[other] = header[other], header[one]
    elif kind == "values":
        changed = bytearray(body)
        for _ in range(8):  # mantissas, so that numbers stay numbers
            changed[4 * rng.randrange(len(body) // 4)] = rng.randrange(256)
        body = bytes(changed)
    elif kind == "json":
        kind = change_json(rng, header)
    elif kind == "offsets":
        entry = header[rng.choice(names)]
        which = rng.randrange(2)
        entry["data_offsets"][which] += rng.choice((-4, 4, 1, -1, 64, 10**6, -(10**6)))
    elif kind == "pad":
        text = to_json(header) + b" " * rng.randint(1, 4096)
    text = to_json(header) if text is None else text
    size = rng.choice((0, 2**63, 2**64 - 1, len(text) - 1, len(text) + 1, 10**8))
    size = size if kind == "length" else len(text)
    data = size.to_bytes(8, "little") + text + body
    if kind == "blind":
        data, kind = _blindly(rng, data, rng.choice((None, 8 + len(text))))
    path.write_bytes(data)
    return f"{path.name}: {kind}"


# -- entries of the folder ------------------------------------------------------------------------


def _entries(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(("gone", "blind", "folder", "out", "loop", "pipe", "inside", "more", "copy"))
    data = path.read_bytes()
    if kind == "more":
        (folder / rng.choice(("README.md", "x.json", "x.py", "consolidated.00.pth"))).write_text(
            "x"
        )
    elif kind == "copy":
        shutil.copyfile(path, folder / f"copy-{path.name}")
    elif kind == "blind":
        data, kind = _blindly(rng, data)
        path.write_bytes(data)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "out":
            path.symlink_to("/etc/hostname")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "inside":
            (folder / "blob").write_bytes(data)
            path.symlink_to("blob")
    return f"{path.name}: {kind}"


# -- GGUF ------------------------------------------------------------------------------------------


def _gguf_harmless(rng: random.Random, layout: gguf_layout.Layout) -> str:
    kind = rng.choice(("order", "rows", "key", "name"))
    if kind == "order":
        rng.shuffle(layout.pairs)
    elif kind == "rows":
        rng.shuffle(layout.rows)
    elif kind == "key":
        layout.pairs.append(gguf_layout.Pair(b"nobody.knows", 4, (7).to_bytes(4, "little")))
    else:
        layout.replace(b"general.name", gguf_layout.text(b"another"))
    return f"harmless: {kind}"


def _gguf_value(rng: random.Random, layout: gguf_layout.Layout) -> str:
    pair = rng.choice(layout.pairs)
    kind = rng.choice(("bits", "bits", "delete", "type", "key", "string", "twice"))
    if kind == "bits":
        at = rng.randrange(len(pair.payload))
        pair.payload = pair.payload[:at] + rng.randbytes(1) + pair.payload[at + 1 :]
    elif kind == "delete":
        layout.pairs.remove(pair)
    elif kind == "type":
        pair.kind = rng.randrange(15)
    elif kind == "key":
        pair.key = rng.choice((b"", b"\xff", b"k" * 100_000, pair.key + b"x"))
    elif kind == "string":
        pair.kind, pair.payload = 8, gguf_layout.text(rng.choice((b"", b"x" * 10**6, b"\xff")))
    else:
        layout.pairs.append(dataclasses.replace(pair))
    return f"{kind} of {pair.key[:40]!r}"


def _gguf_number(rng: random.Random, layout: gguf_layout.Layout) -> str:
    """A scalar becomes another number of its type."""
    sizes = {4: 4, 5: 4, 6: 4, 10: 8, 12: 8}
    pair = rng.choice([pair for pair in layout.pairs if pair.kind in sizes])
    size = sizes[pair.kind]
    old = int.from_bytes(pair.payload, "little")
    new = rng.choice(
        (0, 1, old + 1, max(old, 1) - 1, 2 * old, 2 ** (8 * size) - 1, 10**9, 0x7FC00000)
    )
    pair.payload = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return f"{pair.key.decode()}: {old} becomes {new}"


def _gguf_row(rng: random.Random, layout: gguf_layout.Layout) -> str:
    row = rng.choice(layout.rows)
    kind = rng.choice(("name", "shape", "dims", "type", "offset", "twice", "gone"))
    if kind == "name":
        row.name = rng.choice((b"", b"x", b"\xff\xfe", b"n" * 100_000, row.name + b"x"))
    elif kind == "shape":
        row.shape[rng.randrange(len(row.shape))] = rng.choice((0, 1, 2**32, 2**63, 2**64 - 1, 7))
    elif kind == "dims":
        row.shape += [1] * rng.choice((1, 3, 5))
    elif kind == "type":
        row.kind = rng.randrange(45)
    elif kind == "offset":
        row.offset = rng.choice((0, 1, 32, 2**40, 2**64 - 1, row.offset + 32))
    elif kind == "twice":
        layout.rows.append(dataclasses.replace(row))
    else:
        layout.rows.remove(row)
    return f"{kind} of tensor {row.name[:40]!r}"


def _gguf_counts(rng: random.Random, layout: gguf_layout.Layout) -> str:
    which = rng.choice(("version", "tensor_count", "pair_count"))
    value = rng.choice((0, 1, 2, 3, 10**6, 2**31, 2**32 - 1))
    setattr(layout, which, value)
    return f"{which} becomes {value}"


def _gguf_blind(rng: random.Random, layout: gguf_layout.Layout) -> str:
    layout.raw, how = _blindly(rng, layout.to_bytes(), rng.choice((None, 500, 5000)))
    return how


_GGUF = (
    _gguf_harmless, _gguf_value, _gguf_value, _gguf_number, _gguf_number,
    _gguf_row, _gguf_counts, _gguf_blind,
)  # fmt: skip
_TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "safetensors": _safetensors,
    "index": _json_file("model.safetensors.index.json"),
    "config": _json_file("config.json"),
    "generation_config": _json_file("generation_config.json"),
    "tokenizer": _json_file("tokenizer.json"),
    "tokenizer_config": _json_file("tokenizer_config.json"),
    "entries": _entries,
    "gguf": _entries,  # a file, not a folder: see `mutate`
}
_WEIGHTS = (4, 1, 3, 1, 3, 1, 2, 3)
"""Of the targets: most where most can go wrong, and where good files are many."""
