"""The ONNX graph of a decoder, built directly from its description; factored layers stay factored.

    y = (x V) * s U^T + b

is MatMul, Mul, MatMul (and Add): no initializer has a factored layer's dense shape. Opset 21 primitives only, so that any
onnxruntime since 1.20 runs it. Weights are read when the file is written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

import sctconv
from sctconv.formats.errors import MissingEntryError
from sctconv.formats.reader import SctFile

from .decoder_spec import DecoderSpec, Norm, Rotary

OPSET: Final = 21
_IR_VERSION: Final = 10
_HIDDEN: Final = -1e30
"""What is added to the score of a token that is not seen: finite, as a row that sees nothing (padding) must not be NaN."""

Value = ir.Value


def build_graph(spec: DecoderSpec, file: SctFile) -> ir.Model:
    """A decoder with a KV cache.

    Inputs: input_ids (batch, sequence), attention_mask (batch, past + sequence), position_ids (batch, sequence), all int64, and
    past_key_values.N.key and .value (batch, key-value heads, past, head). Outputs: logits (batch, sequence, vocabulary) and
    present.N.key and .value. Everything that floats is float32. Padding is on the left: a token is at the place that its
    column is at, and `attention_mask` hides what is padding.

    Args:
        spec: the description.
        file: the model; it must stay open until the graph is written.

    Raises:
        MissingEntryError: the file lacks a tensor.
    """
    return _Decoder(spec, file).build()


class _Ops:
    """Nodes and initializers, by short names."""

    def __init__(self) -> None:
        self.tape = Tape()
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._weights: dict[str, Value] = {}

    def op(self, kind: str, *inputs: Value | None, **attributes: Any) -> Value:
        return self.tape.op(kind, inputs, attributes)

    def constant(self, value: Any, dtype: type) -> Value:
        """A small constant, once."""
        array: np.ndarray = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=f"constant_{len(self._constants)}"))
        return self._constants[key]

    def integers(self, *values: int) -> Value:
        return self.constant(values, np.int64)

    def number(self, value: float) -> Value:
        return self.constant(value, np.float32)

    def weight(self, name: str, shape: Sequence[int], read: Callable[[], np.ndarray]) -> Value:
        """A float32 initializer that is read when the file is written, once."""
        if name not in self._weights:
            lazy = ir.LazyTensor(
                lambda: ir.tensor(np.ascontiguousarray(read(), np.float32)),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape(shape),
                name=name,
            )
            self._weights[name] = self.tape.initializer(lazy)
        return self._weights[name]

    def reshape(self, x: Value, *shape: int) -> Value:
        """0 keeps a dimension, -1 takes what is left."""
        return self.op("Reshape", x, self.integers(*shape))

    def transpose(self, x: Value, *order: int) -> Value:
        return self.op("Transpose", x, perm=list(order))

    def scaled(self, x: Value, by: float) -> Value:
        return x if by == 1.0 else self.op("Mul", x, self.number(by))

    def capped(self, x: Value, cap: float | None) -> Value:
        """c tanh(x / c)."""
        return x if cap is None else self.scaled(self.op("Tanh", self.scaled(x, 1.0 / cap)), cap)


class _Decoder(_Ops):
    def __init__(self, spec: DecoderSpec, file: SctFile) -> None:
        super().__init__()
        self.spec, self.file = spec, file
        self.masks: dict[int | None, Value] = {}
        self.angles: dict[int, tuple[Value, Value]] = {}

    def build(self) -> ir.Model:
        spec = self.spec
        ids = _input("input_ids", ir.DataType.INT64, "batch_size", "sequence_length")
        self.attention_mask = _input("attention_mask", ir.DataType.INT64, "batch_size", "total_sequence_length")
        self.position_ids = _input("position_ids", ir.DataType.INT64, "batch_size", "sequence_length")
        inputs, outputs = [ids, self.attention_mask, self.position_ids], []
        x = self.scaled(self.embedding(ids), spec.embedding_scale)
        for place in range(len(spec.layers)):
            shape = ("batch_size", spec.kv_heads, "past_sequence_length", spec.head_dim)
            past = [_input(f"past_key_values.{place}.{kind}", ir.DataType.FLOAT, *shape) for kind in ("key", "value")]
            x, present = self.block(place, x, past)
            inputs += past
            for value, kind in zip(present, ("key", "value"), strict=True):
                shape = ("batch_size", spec.kv_heads, "total_sequence_length", spec.head_dim)
                outputs.append(_named(value, f"present.{place}.{kind}", shape))
        logits = self.scaled(self.head(self.norm(spec.names.norm, x)), spec.logits_scale)
        logits = _named(
            self.capped(logits, spec.logits_softcap), "logits", ("batch_size", "sequence_length", spec.vocabulary)
        )
        graph = ir.Graph(
            inputs, [logits, *outputs], nodes=self.tape.nodes, initializers=self.tape.initializers,
            opset_imports={"": OPSET}, name=spec.model_type,
        )  # fmt: skip
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="sctconv", producer_version=sctconv.__version__)

    def block(self, place: int, x: Value, past: list[Value]) -> tuple[Value, tuple[Value, Value]]:
        names, prefix = self.spec.names, f"{self.spec.names.blocks}.{place}"

        def normed(name: str | None, x: Value) -> Value:
            return x if name is None else self.norm(f"{prefix}.{name}", x)

        attended, present = self.attention(place, prefix, normed(names.pre_attention, x), past)
        attended = self.scaled(normed(names.post_attention, attended), self.spec.residual_scale)
        if self.spec.parallel:
            processed = self.mlp(prefix, normed(names.pre_mlp, x))
            return self.op("Add", x, self.op("Add", attended, normed(names.post_mlp, processed))), present
        x = self.op("Add", x, attended)
        processed = normed(names.post_mlp, self.mlp(prefix, normed(names.pre_mlp, x)))
        return self.op("Add", x, self.scaled(processed, self.spec.residual_scale)), present

    def attention(self, place: int, prefix: str, x: Value, past: list[Value]) -> tuple[Value, tuple[Value, Value]]:
        """Grouped heads share keys and values without copies: the group's queries stand one below the other."""
        spec, names, kind = self.spec, self.spec.names, self.spec.layers[place]
        q, k, v = self.queries_keys_values(prefix, x)
        if spec.per_head_norm:
            q, k = (self.heads_normed(prefix, name, part) for name, part in ((names.q_norm, q), (names.k_norm, k)))
        q, k, v = (self.transpose(part, 0, 2, 1, 3) for part in (q, k, v))  # (batch, heads, sequence, head)
        if kind.rotary is not None:
            q, k = (self.rotated(part, kind.rotary) for part in (q, k))
        k, v = (self.op("Concat", before, part, axis=2) for before, part in zip(past, (k, v), strict=True))
        group = spec.heads // spec.kv_heads
        sequence = self.op("Shape", q, start=2, end=3)
        split = self.op("Concat", self.integers(0, spec.kv_heads, group), sequence, self.integers(-1), axis=0)
        joined = self.op(
            "Concat", self.integers(0, spec.kv_heads), self.integers(-1), self.integers(spec.head_dim), axis=0
        )
        scores = self.op("MatMul", self.op("Reshape", q, joined), self.transpose(k, 0, 1, 3, 2))
        scores = self.capped(self.scaled(scores, spec.attention_scale), spec.attention_softcap)
        scores = self.op("Add", self.op("Reshape", scores, split), self.mask(kind.window))
        weights = self.op("Reshape", self.op("Softmax", scores, axis=-1), self.flattened(scores))
        mixed = self.op("Reshape", self.op("MatMul", weights, v), split)  # (batch, kv, group, sequence, head)
        mixed = self.reshape(self.transpose(mixed, 0, 3, 1, 2, 4), 0, 0, spec.heads * spec.head_dim)
        return self.linear(f"{prefix}.{names.o}", mixed), (k, v)

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
            parts = self.tape.op_multi_out("Split", [fused, self.integers(*widths)], {"axis": axis}, num_outputs=3)
        else:
            parts = [self.linear(f"{prefix}.{name}", x) for name in (names.q, names.k, names.v)]
        if not spec.per_head_norm:
            norms = (names.q_norm, names.k_norm, None)
            parts = [
                part if name is None else self.norm(f"{prefix}.{name}", part)
                for name, part in zip(norms, parts, strict=True)
            ]
        q, k, v = (self.reshape(part, 0, 0, size, spec.head_dim) for part, size in zip(parts, sizes, strict=True))
        return q, k, v

    def heads_normed(self, prefix: str, name: str | None, x: Value) -> Value:
        return x if name is None else self.norm(f"{prefix}.{name}", x)

    def rotated(self, x: Value, rotary: Rotary) -> Value:
        """x (batch, heads, sequence, head) with the first half of its rotated dimensions turned with the second."""
        half = len(rotary.inv_freq)
        cos, sin = self.cos_sin(rotary)
        rest = self.spec.head_dim - 2 * half
        widths = self.integers(half, half, *([rest] if rest else []))
        one, two, *more = self.tape.op_multi_out("Split", [x, widths], {"axis": 3}, num_outputs=3 if rest else 2)
        first = self.op("Sub", self.op("Mul", one, cos), self.op("Mul", two, sin))
        second = self.op("Add", self.op("Mul", two, cos), self.op("Mul", one, sin))
        return self.op("Concat", first, second, *more, axis=3)

    def cos_sin(self, rotary: Rotary) -> tuple[Value, Value]:
        """Each (batch, 1, sequence, half); once for layers that share it."""
        key = hash((rotary.inv_freq.tobytes(), rotary.scale))
        if key not in self.angles:
            positions = self.op("Unsqueeze", self.position_ids, self.integers(1, 3))
            positions = self.op("Cast", positions, to=ir.DataType.FLOAT)
            angles = self.op("Mul", positions, self.constant(rotary.inv_freq, np.float32))
            self.angles[key] = (
                self.scaled(self.op("Cos", angles), rotary.scale),
                self.scaled(self.op("Sin", angles), rotary.scale),
            )
        return self.angles[key]

    def mask(self, window: int | None) -> Value:
        """What is added to scores (batch, kv, group, sequence, total): nothing, or `_HIDDEN`; once for each window."""
        if window not in self.masks:
            total = self.op("Shape", self.attention_mask, start=1, end=2)
            sequence = self.op("Shape", self.position_ids, start=1, end=2)
            zero, one = self.constant(0, np.int64), self.constant(1, np.int64)
            last = self.op("Squeeze", total)
            columns = self.op("Range", zero, last, one)
            rows = self.op(
                "Unsqueeze",
                self.op("Range", self.op("Sub", last, self.op("Squeeze", sequence)), last, one),
                self.integers(1),
            )
            back = self.op("Sub", rows, columns)
            seen = self.op("GreaterOrEqual", back, zero)
            if window is not None:
                seen = self.op("And", seen, self.op("Less", back, self.constant(window, np.int64)))
            real = self.op(
                "Cast", self.op("Unsqueeze", self.attention_mask, self.integers(1, 2, 3)), to=ir.DataType.BOOL
            )
            seen = self.op("And", seen, real)
            self.masks[window] = self.op("Where", seen, self.number(0.0), self.number(_HIDDEN))
        return self.masks[window]

    def mlp(self, prefix: str, x: Value) -> Value:
        names = self.spec.names
        if names.gate_up is not None:
            fused = self.linear(f"{prefix}.{names.gate_up}", x)
            gate, up = self.tape.op_multi_out("Split", [fused], {"axis": 2, "num_outputs": 2}, num_outputs=2)
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

    def norm(self, name: str, x: Value) -> Value:
        norm: Norm = self.spec.norm
        weight = self.vector(f"{name}.weight", norm.offset)
        if norm.kind == "layer":
            bias = self.vector(f"{name}.bias") if f"{name}.bias" in self.file.index.tensors else None
            return self.op("LayerNormalization", x, weight, bias, epsilon=norm.eps)
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.integers(-1))
        root = self.op("Sqrt", self.op("Add", mean, self.number(norm.eps)))
        return self.op("Mul", self.op("Div", x, root), weight)

    def embedding(self, ids: Value) -> Value:
        names = self.spec.names
        if names.embedding in self.file.index.layers:
            rows = self.op("Gather", self.matrix(f"{names.embedding}.U"), ids)
            rows = self.op("Mul", rows, self.vector(f"{names.embedding}.s"))
            x = self.op("MatMul", rows, self.matrix(f"{names.embedding}.V", transposed=True))
        else:
            x = self.op("Gather", self.matrix(f"{names.embedding}.weight"), ids)
        if names.positions is None:
            return x
        return self.op("Add", x, self.op("Gather", self.matrix(f"{names.positions}.weight"), self.position_ids))

    def head(self, x: Value) -> Value:
        """The output layer; one that is tied to the embedding uses that, with no copy of it in the file."""
        names, tensors = self.spec.names, self.file.index.tensors
        if not self.spec.tied or names.head in self.file.index.layers or f"{names.head}.weight" in tensors:
            return self.linear(names.head, x)
        if names.embedding in self.file.index.layers:
            low = self.op(
                "Mul", self.op("MatMul", x, self.matrix(f"{names.embedding}.V")), self.vector(f"{names.embedding}.s")
            )
            return self.op("MatMul", low, self.transpose(self.matrix(f"{names.embedding}.U"), 1, 0))
        flat = self.op(
            "Gemm", self.reshape(x, -1, self.spec.hidden), self.matrix(f"{names.embedding}.weight"), transB=1
        )
        return self.op("Reshape", flat, self.op("Concat", self.op("Shape", x, end=2), self.integers(-1), axis=0))

    def linear(self, name: str, x: Value) -> Value:
        """x (batch, sequence, in) -> (batch, sequence, out) of a factored or dense layer."""
        if name in self.file.index.layers:
            low = self.op("Mul", self.op("MatMul", x, self.matrix(f"{name}.V")), self.vector(f"{name}.s"))
            y = self.op("MatMul", low, self.matrix(f"{name}.U", transposed=True))
        else:
            is_conv1d = self.spec.model_type == "gpt2" and name != self.spec.names.head  # which stores W^T
            y = self.op("MatMul", x, self.matrix(f"{name}.weight", transposed=not is_conv1d))
        bias = f"{name}.bias"
        return self.op("Add", y, self.vector(bias)) if bias in self.file.index.tensors else y

    def matrix(self, name: str, *, transposed: bool = False) -> Value:
        entry = self._entry(name)
        shape = tuple(reversed(entry.shape)) if transposed else entry.shape
        label = f"{name}.T" if transposed else name

        def read() -> np.ndarray:
            array = self.file.tensor(name).astype(np.float32)
            return array.T if transposed else array

        return self.weight(label, shape, read)

    def vector(self, name: str, offset: float = 0.0) -> Value:
        return self.weight(
            name, self._entry(name).shape, lambda: self.file.tensor(name).astype(np.float32) + np.float32(offset)
        )

    def _entry(self, name: str) -> Any:
        if name not in self.file.index.tensors:
            raise MissingEntryError(f"{self.file.path}: lacks {name}, which a {self.spec.model_type} has")
        return self.file.index.tensors[name]


def _input(name: str, dtype: ir.DataType, *shape: int | str) -> Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _named(value: Value, name: str, shape: Sequence[int | str]) -> Value:
    value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
    return value
