"""The ONNX graph of a decoder, built directly from its description; factored layers stay factored.

    y = (x V) * s U^T + b

is MatMul, Mul, MatMul (and Add): no initializer has a factored layer's dense shape. This is the `portable` profile: opset 21
primitives only, so that any onnxruntime since 1.20 runs it; `onnx_profiles` has what differs in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

import sctconv
from sctconv.formats.reader import SctFile

from .decoder_spec import DecoderSpec, LayerKind, Norm, Rotary
from .onnx_ops import TABLE_BITS, Ops, Value

_IR_VERSION: Final = 10


class Decoder(Ops):
    """A decoder with a KV cache.

    Inputs: input_ids (batch, sequence), attention_mask (batch, past + sequence), position_ids (batch, sequence), all int64, and
    past_key_values.N.key and .value (batch, key-value heads, past, head). Outputs: logits (batch, sequence, vocabulary) float32
    and present.N.key and .value. Padding is on the left: a token is at the place that its column is at, and
    `attention_mask` hides what is padding.

    Args:
        spec: the description.
        file: the model; it must stay open until the graph is written.
        dtype: of weights, activations and cache, numpy's float32 or float16.
        bits: of matrices, 8 or 4; None for as they are.
    """

    profile = "portable"
    opset = 21
    takes_padding = True
    """Whether a shorter prompt of a batch may begin with padding."""
    angle_axes: tuple[int, ...] = (1, 3)
    """Where positions (batch, sequence) get dimensions of one before they meet the frequencies."""

    def __init__(self, spec: DecoderSpec, file: SctFile, dtype: Any = np.float32, bits: int | None = None) -> None:
        super().__init__(file, dtype, bits)
        self.spec = spec
        self.hidden_score = max(-1e30, float(np.finfo(self.dtype).min))
        """What is added to the score of a token that is not seen: finite, as a row that sees nothing (padding) must not be NaN."""

    def build(self) -> ir.Model:
        """The whole graph.

        Raises:
            MissingEntryError: the file lacks a tensor.
        """
        spec = self.spec
        ids = _input("input_ids", ir.DataType.INT64, "batch_size", "sequence_length")
        self.attention_mask = _input("attention_mask", ir.DataType.INT64, "batch_size", "total_sequence_length")
        self.position_ids = _input("position_ids", ir.DataType.INT64, "batch_size", "sequence_length")
        inputs, outputs = [ids, self.attention_mask, self.position_ids], []
        x, delta = self.scaled(self.embedding(ids), spec.embedding_scale), None
        for place in range(len(spec.layers)):
            shape = ("batch_size", spec.kv_heads, "past_sequence_length", spec.head_dim)
            past = [_input(f"past_key_values.{place}.{kind}", self.float, *shape) for kind in ("key", "value")]
            x, delta, present = self.block(place, x, delta, past)
            inputs += past
            for value, kind in zip(present, ("key", "value"), strict=True):
                shape = ("batch_size", spec.kv_heads, "total_sequence_length", spec.head_dim)
                outputs.append(_named(value, f"present.{place}.{kind}", self.float, shape))
        _, x = self.added(x, delta, spec.names.norm)
        logits = self.capped(self.scaled(self.head(x), spec.logits_scale), spec.logits_softcap)
        logits = _named(
            self.cast(logits, np.float32),
            "logits",
            ir.DataType.FLOAT,
            ("batch_size", "sequence_length", spec.vocabulary),
        )
        used = {node.domain for node in self.tape.nodes}
        graph = ir.Graph(
            inputs, [logits, *outputs], nodes=self.tape.nodes, initializers=self.tape.initializers,
            opset_imports={domain: 1 if domain else self.opset for domain in sorted({"", *used})}, name=spec.model_type,
        )  # fmt: skip
        return ir.Model(
            graph, ir_version=_IR_VERSION, producer_name="sctconv", producer_version=sctconv.__version__,
            metadata_props={"sctconv.profile": self.profile},
        )  # fmt: skip

    def block(
        self, place: int, x: Value, delta: Value | None, past: list[Value]
    ) -> tuple[Value, Value, tuple[Value, Value]]:
        """x (batch, sequence, hidden) and what is still to be added to it, before and after a block; keys and values."""
        names, prefix = self.spec.names, f"{self.spec.names.blocks}.{place}"
        norms = {
            part: name and f"{prefix}.{name}"
            for part in ("pre_attention", "post_attention", "pre_mlp", "post_mlp")
            for name in [getattr(names, part)]
        }
        x, read = self.added(x, delta, norms["pre_attention"])
        attended, present = self.attention(place, prefix, read, past)
        attended = self.scaled(self.normed(norms["post_attention"], attended), self.spec.residual_scale)
        if self.spec.parallel:
            same = norms["pre_mlp"] == norms["pre_attention"]
            processed = self.mlp(prefix, read if same else self.normed(norms["pre_mlp"], x))
            return x, self.op("Add", attended, self.normed(norms["post_mlp"], processed)), present
        x, read = self.added(x, attended, norms["pre_mlp"])
        processed = self.normed(norms["post_mlp"], self.mlp(prefix, read))
        return x, self.scaled(processed, self.spec.residual_scale), present

    def added(self, x: Value, delta: Value | None, norm: str | None) -> tuple[Value, Value]:
        """x + delta, and the norm of that (itself where there is no norm)."""
        x = x if delta is None else self.op("Add", x, delta)
        return x, self.normed(norm, x)

    def attention(self, place: int, prefix: str, x: Value, past: list[Value]) -> tuple[Value, tuple[Value, Value]]:
        """The attention of a block, output layer included, and all keys and values."""
        names = self.spec.names
        q, k, v = self.queries_keys_values(prefix, x)
        if self.spec.per_head_norm:
            q, k = (
                self.normed(name and f"{prefix}.{name}", part) for name, part in ((names.q_norm, q), (names.k_norm, k))
            )
        mixed, present = self.attended(self.spec.layers[place], q, k, v, past)
        return self.linear(f"{prefix}.{names.o}", mixed), present

    def attended(
        self, kind: LayerKind, q: Value, k: Value, v: Value, past: list[Value]
    ) -> tuple[Value, tuple[Value, Value]]:
        """q, k and v (batch, sequence, heads, head) to (batch, sequence, heads * head), and all keys and values.

        Grouped heads share keys and values without copies: the group's queries stand one below the other.
        """
        spec = self.spec
        q, k, v = (self.transpose(part, 0, 2, 1, 3) for part in (q, k, v))  # (batch, heads, sequence, head)
        if kind.rotary is not None:
            q, k = (self.rotated(part, kind.rotary) for part in (q, k))
        k, v = (self.op("Concat", before, part, axis=2) for before, part in zip(past, (k, v), strict=True))
        group = spec.heads // spec.kv_heads
        sequence = self.op("Shape", q, start=2, end=3)
        split = self.op("Concat", self.integers(0, spec.kv_heads, group), sequence, self.integers(-1), axis=0)
        q = self.op("Reshape", self.scaled(q, spec.attention_scale), self.integers(0, spec.kv_heads, -1, spec.head_dim))
        scores = self.capped(self.op("MatMul", q, self.transpose(k, 0, 1, 3, 2)), spec.attention_softcap)
        scores = self.op("Add", self.op("Reshape", scores, split), self.mask(kind.window, (1, 2)))
        weights = self.op("Reshape", self.op("Softmax", scores, axis=-1), self.flattened(scores))
        mixed = self.op("Reshape", self.op("MatMul", weights, v), split)  # (batch, kv, group, sequence, head)
        return self.reshape(self.transpose(mixed, 0, 3, 1, 2, 4), 0, 0, spec.heads * spec.head_dim), (k, v)

    def flattened(self, scores: Value) -> Value:
        """The shape (batch, kv, group * sequence, total) of scores (batch, kv, group, sequence, total)."""
        total = self.op("Shape", scores, start=4, end=5)
        return self.op("Concat", self.integers(0, self.spec.kv_heads, -1), total, axis=0)

    def queries_keys_values(self, prefix: str, x: Value) -> tuple[Value, Value, Value]:
        """Each (batch, sequence, heads, head)."""
        spec, names = self.spec, self.spec.names
        sizes = [spec.heads, spec.kv_heads, spec.kv_heads]
        if names.qkv is not None:
            fused = self.linear(f"{prefix}.{names.qkv}", x)
            if names.interleaved:
                fused = self.reshape(fused, 0, 0, spec.heads, 3 * spec.head_dim)
                widths, axis = [spec.head_dim] * 3, 3
            else:
                widths, axis = [size * spec.head_dim for size in sizes], 2
            parts = self.ops("Split", fused, self.integers(*widths), axis=axis, outputs=3)
        else:
            parts = [self.linear(f"{prefix}.{name}", x) for name in (names.q, names.k, names.v)]
        if not spec.per_head_norm:
            norms = (names.q_norm, names.k_norm, None)
            parts = [self.normed(name and f"{prefix}.{name}", part) for name, part in zip(norms, parts, strict=True)]
        q, k, v = (self.reshape(part, 0, 0, size, spec.head_dim) for part, size in zip(parts, sizes, strict=True))
        return q, k, v

    def rotated(self, x: Value, rotary: Rotary) -> Value:
        """x (batch, heads, sequence, head) with the first half of its rotated dimensions turned with the second."""
        half = len(rotary.inv_freq)
        cos, sin = self.cos_sin(rotary)
        rest = self.spec.head_dim - 2 * half
        widths = self.integers(half, half, *([rest] if rest else []))
        one, two, *more = self.ops("Split", x, widths, axis=3, outputs=3 if rest else 2)
        first = self.op("Sub", self.op("Mul", one, cos), self.op("Mul", two, sin))
        second = self.op("Add", self.op("Mul", two, cos), self.op("Mul", one, sin))
        return self.op("Concat", first, second, *more, axis=3)

    def cos_sin(self, rotary: Rotary) -> tuple[Value, Value]:
        """Each (batch, sequence, half) with `angle_axes`; once for layers that share it."""

        def angles() -> Value:
            positions = self.op("Unsqueeze", self.position_ids, self.integers(*self.angle_axes))
            return self.op(
                "Mul", self.op("Cast", positions, to=ir.DataType.FLOAT), self.constant(rotary.inv_freq, np.float32)
            )

        def turned(kind: str) -> Value:
            wave = self.op(kind, self.once((*key, "angles"), angles))
            wave = wave if rotary.scale == 1.0 else self.op("Mul", wave, self.constant(rotary.scale, np.float32))
            return self.cast(wave, self.dtype)

        key = ("rotary", rotary.inv_freq.tobytes(), rotary.scale)
        return self.once((*key, "Cos"), lambda: turned("Cos")), self.once((*key, "Sin"), lambda: turned("Sin"))

    def mask(self, window: int | None, head_axes: tuple[int, ...]) -> Value:
        """What is added to scores (batch, heads..., sequence, total): nothing, or `hidden_score`; once for each window."""

        def make() -> Value:
            total = self.op("Shape", self.attention_mask, start=1, end=2)
            sequence = self.op("Shape", self.position_ids, start=1, end=2)
            zero, one = self.constant(0, np.int64), self.constant(1, np.int64)
            last = self.op("Squeeze", total)
            columns = self.op("Range", zero, last, one)
            first = self.op("Sub", last, self.op("Squeeze", sequence))
            rows = self.op("Unsqueeze", self.op("Range", first, last, one), self.integers(1))
            back = self.op("Sub", rows, columns)
            seen = self.op("GreaterOrEqual", back, zero)
            if window is not None:
                seen = self.op("And", seen, self.op("Less", back, self.constant(window, np.int64)))
            axes = self.integers(*head_axes, len(head_axes) + 1)
            real = self.op("Cast", self.op("Unsqueeze", self.attention_mask, axes), to=ir.DataType.BOOL)
            seen = self.op("And", seen, real)
            return self.op("Where", seen, self.number(0.0), self.number(self.hidden_score))

        return self.once(("mask", window, head_axes), make)

    def mlp(self, prefix: str, x: Value) -> Value:
        names = self.spec.names
        if names.gate_up is not None:
            fused = self.linear(f"{prefix}.{names.gate_up}", x)
            gate, up = self.ops("Split", fused, axis=2, num_outputs=2, outputs=2)
            hidden = self.op("Mul", self.activated(gate), up)
        elif names.gate is not None:
            gate, up = (self.linear(f"{prefix}.{name}", x) for name in (names.gate, names.up))
            hidden = self.op("Mul", self.activated(gate), up)
        else:
            hidden = self.activated(self.linear(f"{prefix}.{names.up}", x))
        return self.linear(f"{prefix}.{names.down}", hidden)

    def activated(self, x: Value) -> Value:
        match self.spec.activation:
            case "silu":
                return self.op("Mul", x, self.op("Sigmoid", x))
            case "relu":
                return self.op("Relu", x)
            case "gelu":
                return self.op("Gelu", x)
            case _:
                return self.op("Gelu", x, approximate="tanh")

    def normed(self, name: str | None, x: Value) -> Value:
        """The norm of this path of x (..., dimensions); x where there is none."""
        norm: Norm = self.spec.norm
        if name is None:
            return x
        weight = self.vector(f"{name}.weight", norm.offset)
        if norm.kind == "rms":
            return self.rms_normed(x, weight)
        bias = self.vector(f"{name}.bias") if f"{name}.bias" in self.file.index.tensors else None
        return self.op("LayerNormalization", x, weight, bias, epsilon=norm.eps)

    def rms_normed(self, x: Value, weight: Value) -> Value:
        """In float32, as squares of activations leave float16's range."""
        wide = self.cast(x, np.float32)
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), self.integers(-1))
        root = self.op("Sqrt", self.op("Add", mean, self.constant(self.spec.norm.eps, np.float32)))
        return self.op("Mul", self.cast(self.op("Div", wide, root), self.dtype), weight)

    def embedding(self, ids: Value) -> Value:
        """Tokens (batch, sequence) to (batch, sequence, hidden)."""
        names = self.spec.names
        if names.embedding in self.file.index.layers:
            rows = self.gather(f"{names.embedding}.U", ids)
            rows = rows if self.bits else self.op("Mul", rows, self.vector(f"{names.embedding}.s"))
            x = self.matmul(rows, f"{names.embedding}.V", transposed=True)
        else:
            x = self.gather(f"{names.embedding}.weight", ids)
        if names.positions is None:
            return x
        return self.op("Add", x, self.gather(f"{names.positions}.weight", self.position_ids))

    def head(self, x: Value) -> Value:
        """The output layer; one that is tied to the embedding uses that, with no copy of it in the file."""
        names, tensors = self.spec.names, self.file.index.tensors
        if not self.spec.tied or names.head in self.file.index.layers or f"{names.head}.weight" in tensors:
            return self.linear(names.head, x)
        if names.embedding in self.file.index.layers:
            return self.factored(x, names.embedding, self.table_matmul)
        return self.table_matmul(x, f"{names.embedding}.weight")

    def linear(self, name: str, x: Value) -> Value:
        """x (batch, sequence, in) -> (batch, sequence, out) of a factored or dense layer."""
        if name in self.file.index.layers:
            y = self.factored(x, name)
        else:
            is_head = name == self.spec.names.head
            is_conv1d = self.spec.model_type == "gpt2" and not is_head  # which stores W^T
            y = self.matmul(x, f"{name}.weight", transposed=not is_conv1d, bits=TABLE_BITS if is_head else None)
        bias = f"{name}.bias"
        return self.op("Add", y, self.vector(bias)) if bias in self.file.index.tensors else y


def _input(name: str, dtype: ir.DataType, *shape: int | str) -> Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _named(value: Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> Value:
    value.name, value.shape, value.dtype = name, ir.Shape(shape), dtype
    return value
