"""Nodes and weights of a graph, by short names: what the profiles are written in.

Weights are read when the file is written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from ml_dtypes import uint4
from onnx_ir.tape import Tape

from sctconv.formats.errors import MissingEntryError
from sctconv.formats.reader import SctFile

from .quantize import BLOCK, Codes, quantised

Value = ir.Value

TABLE_BITS: Final = 8
"""Bits of embeddings and head under `--quantize`: Gather takes no fewer, and what is tied is in the file once."""


class Ops:
    """Nodes and initializers.

    Args:
        file: where weights come from.
        dtype: of weights and activations, numpy's float32 or float16.
        bits: of matrices, 8 or 4; None for as they are.
    """

    def __init__(self, file: SctFile, dtype: Any, bits: int | None) -> None:
        self.tape, self.file, self.dtype, self.bits = Tape(), file, np.dtype(dtype), bits
        self.float = ir.DataType.from_numpy(self.dtype)
        self.rounded: dict[str, Callable[[], np.ndarray]] = {}
        """Tensors that are quantised -> the values that their codes stand for; of factors with the root of s."""
        self._made: dict[Hashable, Value] = {}

    def op(self, kind: str, *inputs: Value | None, **attributes: Any) -> Value:
        """The only output of a node."""
        return self.tape.op(kind, inputs, attributes)

    def ops(
        self, kind: str, *inputs: Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[Value]:
        """All outputs of a node; `com.microsoft` is the domain of those that onnxruntime alone knows."""
        return self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain)

    def constant(self, value: Any, dtype: Any) -> Value:
        """A small constant, once."""
        array: np.ndarray = np.asarray(value, dtype)
        name = f"constant_{len(self._made)}"
        return self.once(
            (array.dtype.str, array.shape, array.tobytes()),
            lambda: self.tape.initializer(ir.tensor(array, name=name)),
        )

    def integers(self, *values: int) -> Value:
        """int64 (n,)."""
        return self.constant(values, np.int64)

    def number(self, value: float) -> Value:
        """A scalar of the activations' dtype."""
        return self.constant(value, self.dtype)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What was made under this key, or what is made now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def reshape(self, x: Value, *shape: int) -> Value:
        """0 keeps a dimension, -1 takes what is left."""
        return self.op("Reshape", x, self.integers(*shape))

    def transpose(self, x: Value, *order: int) -> Value:
        """Dimensions in this order."""
        return self.op("Transpose", x, perm=list(order))

    def scaled(self, x: Value, by: float) -> Value:
        """x * by."""
        return x if by == 1.0 else self.op("Mul", x, self.number(by))

    def capped(self, x: Value, cap: float | None) -> Value:
        """c tanh(x / c)."""
        return x if cap is None else self.scaled(self.op("Tanh", self.scaled(x, 1.0 / cap)), cap)

    def cast(self, x: Value, to: Any) -> Value:
        """x in another numpy dtype, from the activations' own or to it."""
        return (
            x
            if np.dtype(to) == self.dtype == np.float32
            else self.op("Cast", x, to=ir.DataType.from_numpy(np.dtype(to)))
        )

    def vector(self, name: str, offset: float = 0.0) -> Value:
        """A tensor as it is, plus a constant."""
        return self._weight(name, self.entry(name).shape, self.float, lambda: self._read(name) + np.float32(offset))

    def matmul(self, x: Value, name: str, *, transposed: bool, bits: int | None = None) -> Value:
        """x (..., in) times a matrix stored as (in, out), or transposed as (out, in): (..., out).

        Args:
            x: on the left.
            name: of the matrix.
            transposed: how it is stored.
            bits: in place of the graph's, where that quantises.
        """
        if self.bits:
            codes = self._codes(name, transposed, bits or self.bits)
            return self.op("MatMul", x, self.op("DequantizeLinear", *codes, axis=0, block_size=BLOCK))
        if not transposed:
            return self.op("MatMul", x, self._table(name))
        M = self._weight(f"{name}.T", self.entry(name).shape[::-1], self.float, lambda: self._read(name).T)
        return self.op("MatMul", x, M)

    def gather(self, name: str, rows: Value) -> Value:
        """Rows of a table (n, k) by their numbers (batch, sequence): (batch, sequence, k)."""
        if self.bits is None:
            return self.op("Gather", self._table(name), rows)
        found = (self.op("Gather", part, rows, axis=1) for part in self._codes(name, True, TABLE_BITS))
        return self.transpose(self.op("DequantizeLinear", *found, axis=0, block_size=BLOCK), 1, 2, 0)

    def table_matmul(self, x: Value, name: str) -> Value:
        """x (batch, sequence, k) times the rows of a table (n, k) that `gather` reads too, with no copy of it in the file."""
        if self.bits:
            return self.matmul(x, name, transposed=True, bits=TABLE_BITS)
        flat = self.op("Gemm", self.reshape(x, -1, self.entry(name).shape[1]), self._table(name), transB=1)
        return self.op("Reshape", flat, self.op("Concat", self.op("Shape", x, end=2), self.integers(-1), axis=0))

    def factored(self, x: Value, name: str, product: Callable[..., Value] | None = None) -> Value:
        """(x V) * s U^T; of quantised factors, which have sqrt(s) each, x V U^T.

        Args:
            x: (batch, sequence, in).
            name: of the layer.
            product: of what is between and U; None for `matmul`.
        """
        low = self.matmul(x, f"{name}.V", transposed=False)
        if not self.bits:
            low = self.op("Mul", low, self.vector(f"{name}.s"))
        return product(low, f"{name}.U") if product else self.matmul(low, f"{name}.U", transposed=True)

    def entry(self, name: str) -> Any:
        """A tensor's place in the file.

        Raises:
            MissingEntryError: there is none.
        """
        if name not in self.file.index.tensors:
            raise MissingEntryError(f"{self.file.path}: lacks {name}")
        return self.file.index.tensors[name]

    def _table(self, name: str) -> Value:
        return self._weight(name, self.entry(name).shape, self.float, lambda: self._read(name))

    def _read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """float32; a factor that is quantised has the root of the singular values in it, so that both halves weigh the same."""
        array = self.file.read(name, rows).astype(np.float32, copy=False)
        layer, _, letter = name.rpartition(".")
        if self.bits and layer in self.file.index.layers and letter in "UV":
            array *= np.sqrt(self.file.read(f"{layer}.s").astype(np.float32, copy=False))
        return array

    def _codes(self, name: str, transposed: bool, bits: int) -> tuple[Value, Value, Value]:
        """Codes (in, out), scales and zero points (blocks of in, out): the layout that onnxruntime fuses to MatMulNBits."""
        shape = self.entry(name).shape
        in_, out = reversed(shape) if transposed else shape
        kind, dtype = (ir.DataType.UINT8, np.uint8) if bits == 8 else (ir.DataType.UINT4, uint4)

        def made() -> Codes:
            return quantised(_FileRows(self._read, name, shape) if transposed else self._read(name).T, bits)

        def values() -> np.ndarray:
            rows = made().values(in_)
            return rows if transposed else rows.T

        self.rounded[name] = values
        label, blocks = f"{name}.uint{bits}", (-(-in_ // BLOCK), out)
        return (
            self._weight(label, (in_, out), kind, lambda: made().codes.reshape(out, -1)[:, :in_].T.astype(dtype)),
            self._weight(f"{label}.scales", blocks, self.float, lambda: made().scales.T),
            self._weight(f"{label}.zeros", blocks, kind, lambda: made().zeros.T.astype(dtype)),
        )

    def _weight(self, name: str, shape: Sequence[int], kind: ir.DataType, read: Callable[[], np.ndarray]) -> Value:
        """An initializer that is read when the file is written, once."""

        def tensor() -> ir.TensorProtocol:
            array = read()
            return ir.tensor(
                np.ascontiguousarray(array if kind in _CODES else array.astype(self.dtype, copy=False)), dtype=kind
            )

        lazy = ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name)
        return self.once(name, lambda: self.tape.initializer(lazy))


@dataclass(frozen=True)
class _FileRows:
    """A tensor of the file of which only some rows are in memory."""

    read: Callable[[str, slice], np.ndarray]
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(self.name, rows)


_CODES: Final = (ir.DataType.UINT8, ir.DataType.UINT4)
