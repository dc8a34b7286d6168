"""What the other profiles say in fewer, larger nodes; see `Decoder` for what all compute."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx_ir as ir

from .decoder_spec import LayerKind, Rotary
from .onnx_graph import Decoder
from .onnx_ops import Value

_MICROSOFT: Final = "com.microsoft"


class StandardDecoder(Decoder):
    """Opset 23's Attention, RotaryEmbedding and RMSNormalization: any onnxruntime since 1.23.

    Attention with a softcap stays in primitives, as implementations differ in whether the mask comes before or after it.
    """

    profile = "standard"
    opset = 23
    angle_axes = (2,)

    def attended(
        self, kind: LayerKind, q: Value, k: Value, v: Value, past: list[Value]
    ) -> tuple[Value, tuple[Value, Value]]:
        """See `Decoder`."""
        if self.spec.attention_softcap is not None:
            return super().attended(kind, q, k, v, past)
        q, k, v = (self.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
        if kind.rotary is not None:
            q, k = (self.rotated(part, kind.rotary) for part in (q, k))
        mask, scale = self.mask(kind.window, (1,)), self.spec.attention_scale
        mixed, *present = self.ops("Attention", q, k, v, mask, *past, scale=scale, outputs=3)
        flat = self.reshape(self.transpose(mixed, 0, 2, 1, 3), 0, 0, self.spec.heads * self.spec.head_dim)
        return flat, (present[0], present[1])

    def rotated(self, x: Value, rotary: Rotary) -> Value:
        """See `Decoder`."""
        return self.op("RotaryEmbedding", x, *self.cos_sin(rotary), **_part(self.spec.head_dim, rotary))

    def rms_normed(self, x: Value, weight: Value) -> Value:
        """See `Decoder`."""
        return self.op("RMSNormalization", x, weight, epsilon=self.spec.norm.eps)


class OnnxruntimeDecoder(StandardDecoder):
    """onnxruntime's GroupQueryAttention and SkipSimplifiedLayerNormalization, for onnxruntime-genai too.

    past and present are one buffer as long as the cache may grow, and `present` keeps that length. Prompts of a batch are
    padded on the right, never on the left; what follows a cache is one token at a time, or the batch is one.
    """

    profile = "ort"
    takes_padding = False

    def attended(
        self, kind: LayerKind, q: Value, k: Value, v: Value, past: list[Value]
    ) -> tuple[Value, tuple[Value, Value]]:
        """See `Decoder`."""
        spec = self.spec
        q, k, v = (self.reshape(part, 0, 0, -1) for part in (q, k, v))
        if kind.rotary is not None:
            q, k = (
                self.op("RotaryEmbedding", part, *self.cos_sin(kind.rotary), num_heads=heads, **_part(spec.head_dim, kind.rotary))
                for part, heads in ((q, spec.heads), (k, spec.kv_heads))
            )  # fmt: skip
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.attention_scale,
        }
        if kind.window is not None:
            attributes["local_window_size"] = kind.window
        if spec.attention_softcap is not None:
            attributes["softcap"] = spec.attention_softcap
        seen, total = self.once("seen", self.seen), self.once("total", self.total)
        mixed, *present = self.ops(
            "GroupQueryAttention", q, k, v, *past, seen, total, outputs=3, domain=_MICROSOFT, **attributes
        )
        return mixed, (present[0], present[1])

    def seen(self) -> Value:
        """int32 (batch,): the place of each sequence's last token."""
        count = self.op("ReduceSum", self.attention_mask, self.integers(1), keepdims=0)
        return self.op("Cast", self.op("Sub", count, self.constant(1, np.int64)), to=ir.DataType.INT32)

    def total(self) -> Value:
        """int32 scalar: columns of the attention mask."""
        columns = self.op("Squeeze", self.op("Shape", self.attention_mask, start=1, end=2))
        return self.op("Cast", columns, to=ir.DataType.INT32)

    def added(self, x: Value, delta: Value | None, norm: str | None) -> tuple[Value, Value]:
        """See `Decoder`."""
        if delta is None or norm is None or self.spec.norm.kind != "rms":
            return super().added(x, delta, norm)
        weight = self.vector(f"{norm}.weight", self.spec.norm.offset)
        normed, *_, total = self.ops(
            "SkipSimplifiedLayerNormalization",
            x,
            delta,
            weight,
            epsilon=self.spec.norm.eps,
            outputs=4,
            domain=_MICROSOFT,
        )
        return total, normed


def _part(head_dim: int, rotary: Rotary) -> dict[str, int]:
    """The attribute that says how many of a head's dimensions turn, where not all do."""
    turned = 2 * len(rotary.inv_freq)
    return {} if turned == head_dim else {"rotary_embedding_dim": turned}


PROFILES: Final[dict[str, type[Decoder]]] = {
    decoder.profile: decoder for decoder in (Decoder, StandardDecoder, OnnxruntimeDecoder)
}
"""Names of `--profile` -> what builds the graph."""
