"""Dense checkpoints spoiled where it matters: numbers, names and structure of their heads, by a seed.

Each kind of file has a sound one, what spoils it, and what reads it. Whatever comes in, a reader gives the tensors or one of
its own errors in one line.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sctconv.formats.checkpoint import DenseTensors, read_tensor
from sctconv.formats.errors import CheckpointError, SctError
from sctconv.formats.gguf_file import GgufTensors
from sctconv.formats.safetensors_dir import SafetensorsTensors, read_weight_map
from sctconv.runtime.config import ModelError, read_config
from sctconv.sources.torch_bin import TorchBinTensors

NUMBERS = [0, 1, -1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40]
NUMBERS += [1 << 60, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1, 1 << 64, 10**400]
VALUES: list[Any] = [
    *NUMBERS,
    None,
    True,
    0.5,
    1e308,
    "",
    "F32",
    "a",
    "x" * 2000,
    "\x1b[2J",
    "\u2028",
    "../a",
    "/etc/passwd",
]
VALUES += [[], [0], [1 << 32] * 3, [-1, 2], [0, 1 << 62], [1] * 400, {}, {"a": {}}, [[[]]]]
SNIPPETS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"-",
    b"\\",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"[" * 5000,
]

Spoil = Callable[[random.Random], bytes]


# --- what any file can suffer


def spoiled_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes replaced, taken away, doubled, put in; or a cut."""
    spoiled = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(max(1, len(spoiled)))
        match rng.randrange(6):
            case 0 | 1:
                spoiled[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                del spoiled[place : place + rng.randint(1, 20)]
            case 3:
                spoiled[place:place] = spoiled[place : place + rng.randint(1, 60)]
            case 4:
                spoiled[place:place] = rng.choice(SNIPPETS)
            case 5:
                del spoiled[place:]
    return bytes(spoiled)


def spoiled_json(rng: random.Random, item: Any) -> bytes:
    """Values replaced, deleted or copied from elsewhere; then perhaps the text spoiled or a key doubled."""
    item = copy.deepcopy(item)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key = rng.choice(_spots(item))
        match rng.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                del holder[key]
            case 3:
                other, there = rng.choice(_spots(item) or [(holder, key)])
                holder[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else 0
        if not _spots(item):
            break
    text = json.dumps(item).encode()
    match rng.randrange(6):
        case 0:
            return spoiled_bytes(rng, text)
        case 1 if text.startswith(b"{") and len(text) > 2:
            return text[:-1] + b", " + text[1:]  # every key twice
    return text


def _spots(item: Any) -> list[tuple[Any, Any]]:
    """Every value of a JSON object, as its holder and key."""
    keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
    return [spot for key in keys for spot in ((item, key), *_spots(item[key]))]


# --- safetensors

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "e": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
    "scalar": {"dtype": "F64", "shape": [], "data_offsets": [32, 40]},
}
DATA = bytes(range(40))


def safetensors(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % (1 << 64)) + header + data


def spoiled_safetensors(rng: random.Random) -> bytes:
    header = json.dumps(HEADER).encode()
    match rng.randrange(8):
        case 0:
            return spoiled_bytes(rng, safetensors(header))
        case 1:
            return safetensors(header, length=rng.choice([*NUMBERS, len(header) - 1, len(header) + rng.randint(1, 50)]))
        case 2:
            return safetensors(header, bytes(rng.randrange(100)))
    return safetensors(spoiled_json(rng, HEADER))


# --- GGUF


@dataclass
class GgufParts:
    """The head of a GGUF file as its numbers and texts in order, so that each can be spoiled by itself."""

    parts: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, kind: str, *values: Any) -> GgufParts:
        self.parts += [(kind, value) for value in values]
        return self

    def text(self, text: bytes) -> GgufParts:
        return self.add("Q", len(text)).add("s", text)

    def build(self) -> bytes:
        pieces = [b"GGUF"]
        for kind, value in self.parts:
            wide = {"I": 32, "Q": 64}.get(kind)
            pieces.append(value if wide is None else (value % (1 << wide)).to_bytes(wide // 8, "little"))
        head = b"".join(pieces)
        return head + bytes(-len(head) % 32) + bytes(range(192))


def sound_gguf() -> GgufParts:
    parts = GgufParts().add("I", 3).add("Q", 4, 7)
    parts.text(b"general.architecture").add("I", 8).text(b"llama")
    parts.text(b"general.alignment").add("I", 4, 32)
    parts.text(b"llama.block_count").add("I", 4, 2)
    parts.text(b"llama.rope.freq_base").add("I", 6, 0x461C4000)
    parts.text(b"tokenizer.ggml.tokens").add("I", 9, 8).add("Q", 3).text(b"a").text(b"bc").text(b"")
    parts.text(b"tokenizer.ggml.scores").add("I", 9, 6).add("Q", 3).add("I", 0, 0, 0)
    parts.text(b"nested").add("I", 9, 9).add("Q", 2).add("I", 0).add("Q", 1).add("s", b"1").add("I", 0).add("Q", 0)
    for name, dims, kind, offset in [
        (b"token_embd.weight", [4, 3], 0, 0),
        (b"blk.0.attn_q.weight", [32, 2], 2, 64),  # Q4_0
        (b"b", [4], 30, 128),  # BF16
        (b"none", [0, 2], 1, 160),
    ]:
        parts.text(name).add("I", len(dims)).add("Q", *dims).add("I", kind).add("Q", offset)
    return parts


def spoiled_gguf(rng: random.Random) -> bytes:
    parts = sound_gguf()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.randrange(len(parts.parts))
        kind, value = parts.parts[place]
        match rng.randrange(8):
            case 0:
                del parts.parts[place : place + rng.randint(1, 4)]
            case 1:
                parts.parts[place:place] = parts.parts[place : place + rng.randint(1, 8)]
            case 2:
                other = rng.randrange(len(parts.parts))
                parts.parts[place], parts.parts[other] = parts.parts[other], parts.parts[place]
            case _ if kind == "s":
                parts.parts[place] = (
                    kind,
                    rng.choice([b"", b"\xff\xfe", b"\x1b[2J", value * 50, spoiled_bytes(rng, value)]),
                )
            case 3:
                parts.parts[place] = (kind, value + rng.choice([-32, -8, -1, 1, 2, 8, 32]))
            case _:
                parts.parts[place] = (kind, rng.choice(NUMBERS))
        if not parts.parts:
            break
    return spoiled_bytes(rng, parts.build()) if rng.randrange(5) == 0 else parts.build()


# --- an index, a configuration, a torch .bin

WEIGHT_MAP = {"metadata": {"total_size": 40}, "weight_map": {"a": "1.safetensors", "b.weight": "1.safetensors"}}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "text_config": {"num_hidden_layers": 2, "hidden_size": 32},
}


@cache
def sound_bin() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}, file)
    return file.getvalue()


# --- what reads them


def read_all(source: DenseTensors) -> None:
    for name, info in source.tensors.items():
        assert read_tensor(source, name).shape == info.shape


def _read_index(path: Path) -> None:
    (path.parent / "1.safetensors").write_bytes(safetensors(json.dumps(HEADER).encode()))
    weight_map = read_weight_map(path)
    shards = [path.parent / file for file in sorted(set(weight_map.values()))]
    assert all(shard.parent == path.parent for shard in shards)
    read_all(SafetensorsTensors(shards, weight_map))


@dataclass(frozen=True)
class Kind:
    """A kind of file: a sound one, one spoiled by a seed, what reads it, and the errors it may give."""

    sound: Callable[[], bytes]
    spoil: Spoil
    read: Callable[[Path], object]
    error: type[SctError] = CheckpointError


KINDS = {
    "safetensors": Kind(
        lambda: safetensors(json.dumps(HEADER).encode()),
        spoiled_safetensors,
        lambda path: read_all(SafetensorsTensors([path])),
    ),
    "gguf": Kind(lambda: sound_gguf().build(), spoiled_gguf, lambda path: read_all(GgufTensors(path))),
    "index": Kind(lambda: json.dumps(WEIGHT_MAP).encode(), lambda rng: spoiled_json(rng, WEIGHT_MAP), _read_index),
    "config": Kind(
        lambda: json.dumps(CONFIG).encode(),
        lambda rng: spoiled_json(rng, CONFIG),
        lambda path: read_config(path.read_bytes(), str(path), [(96, 32), (64, 32), (32,)]),
        ModelError,
    ),
    "bin": Kind(sound_bin, lambda rng: spoiled_bytes(rng, sound_bin()), lambda path: read_all(TorchBinTensors([path]))),
}


def refusal(kind: Kind, path: Path, data: bytes) -> SctError | None:
    """What a reader says of a file; None where it reads it. Anything but one line of its own error goes through."""
    path.write_bytes(data)
    try:
        kind.read(path)
    except kind.error as error:
        text = str(error)
        assert text.startswith(str(path.parent)) and text.isprintable() and len(text) < len(str(path)) + 600, text
        return error
    return None
