"""How a calibrated conversion stays within a memory budget: batch size, disk, and which closed form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sctconv.errors import OptionError
from sctconv.runtime.memory import installed_bytes, release_free, rss_bytes

from .decoder import Decoder
from .fit import closed_form_bytes, closed_form_dual_bytes

_BATCHES: Final = (4, 2, 1)
_LOOKS: Final = 4
"""How many times a batch's activations are held while it is found out what a block's layers do, before any closed form."""

_WORKSPACE: Final = 128 << 20
"""What the libraries of linear algebra take for themselves, bytes."""

_SHARE: Final = 0.75
"""Of the machine's memory, where no limit is given."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a sweep may hold.

    Attributes:
        batch: windows that are run at once.
        spill: directory for the hidden states; None to keep them in memory.
        gram_side: inputs of a layer up to which its n x n Gram matrix is formed.
        dual_tokens: how many tokens the closed form takes for a layer with more inputs.
        estimate: bytes that the sweep is expected to take at most.
        limit: bytes that it may take.
        bf16: whether blocks multiply in bfloat16 on text that is fitted on; what is measured is float32 all the same.
    """

    batch: int = 4
    spill: Path | None = None
    gram_side: int = 1 << 62
    dual_tokens: int = 0
    estimate: int = 0
    limit: int = 0
    bf16: bool = False


def plan_memory(
    decoder: Decoder, tokens: int, context: int, *, limit: int | None, directory: Path, bf16: bool = False
) -> MemoryPlan:
    """Makes a sweep fit into a limit.

    Counted are what the process has already, the largest block in float32, one layer's closed form, a batch of
    activations, the output layer while there are no blocks, and the hidden states where they stay in memory. All hidden states are spilled or none. Products in bfloat16
    take a copy of the block in it, and are done without where there is no room.

    Args:
        decoder: the model.
        tokens: of all calibration windows.
        context: tokens in a window.
        limit: bytes of resident memory; None for three quarters of the machine's.
        directory: where hidden states go that do not fit.
        bf16: whether bfloat16 is wanted.

    Raises:
        OptionError: not even the smallest choice fits.
    """
    limit = limit if limit is not None else int(_SHARE * installed_bytes())
    release_free()  # or what was needed to get here counts as taken
    shapes, width = decoder.shapes, decoder.width
    base = rss_bytes() + _WORKSPACE + decoder.block_bytes
    # tokens x (width of the residual stream): both sides, what the teacher's layers saw, and a second stream in a block
    states = 5 * 4 * tokens * width
    widest = max(max(shape) for shape in shapes)

    def batch_bytes(batch: int) -> int:
        return batch * context * 4 * (6 * widest + 12 * width)

    for batch in _BATCHES:
        left = limit - base - batch_bytes(batch)
        grams = {n: max(closed_form_bytes(m, k) for m, k in shapes if k == n) for _, n in shapes}
        small = [n for n, need in sorted(grams.items()) if need <= left]
        large = [(m, n) for m, n in shapes if n not in small]
        head = decoder.head_bytes - decoder.block_bytes - batch_bytes(batch)  # in their place
        need = max((_LOOKS * batch_bytes(batch), head, *(grams[n] for n in small)))
        dual_tokens = 0
        if large:
            dual_tokens = _most_tokens(large, left, tokens)
            need = max(need, *(closed_form_dual_bytes(m, n, dual_tokens) for m, n in large))
        if need > left or (large and dual_tokens < min(tokens, context)):
            continue
        fits = need + states <= left
        need += states if fits else 0
        bf16 = bf16 and need + decoder.block_bytes // 2 <= left
        need += decoder.block_bytes // 2 if bf16 else 0
        return MemoryPlan(
            batch,
            None if fits else directory,
            max(small, default=0),
            dual_tokens,
            base + batch_bytes(batch) + need,
            limit,
            bf16,
        )
    forms = max(min(closed_form_bytes(m, n), closed_form_dual_bytes(m, n, context)) for m, n in shapes)
    least = base + batch_bytes(1) + max(_LOOKS * batch_bytes(1), forms)
    least = max(least, base - decoder.block_bytes + decoder.head_bytes)
    raise OptionError(
        f"--max-memory {limit / 2**30:.3g}GiB: calibration holds one block in float32 and its Gram matrices, or the output "
        f"layer and some logits, here at least {least / 2**30:.2f} GiB; allow more, or use --data-free"
    )


def _most_tokens(shapes: list[tuple[int, int]], room: int, most: int) -> int:
    """How many tokens the dual form can take in some room, up to `most`, by bisection; 0 if not one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = max(closed_form_dual_bytes(m, n, middle) for m, n in shapes) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
