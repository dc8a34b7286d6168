"""Text from a model, as it comes."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TextIteratorStreamer, set_seed

from sctconv.formats.errors import SctError

from .chat_template import render_chat


class GenerationError(SctError):
    """The prompt or an option does not suit the model."""


@dataclass(frozen=True)
class GenerateOptions:
    """How to choose the next token. None leaves a value to the model's own generation_config.json.

    Attributes:
        max_new_tokens: where to stop if the model does not; it also stops where its context is full.
        temperature: 0 for the most likely token each time; otherwise divides the logits before sampling.
        top_p: sample from the smallest set of tokens with this probability together.
        top_k: sample from this many most likely tokens.
        seed: of the sampling.

    Raises:
        GenerationError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"--max-new-tokens {self.max_new_tokens}: at least 1")
        if self.temperature is not None and not 0.0 <= self.temperature < 100.0:
            raise GenerationError(f"--temperature {self.temperature:g}: at least 0, below 100")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"--top-p {self.top_p:g}: above 0, at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"--top-k {self.top_k}: at least 1")

    def to_transformers(self) -> dict[str, Any]:
        """As arguments of transformers' `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0.0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                chosen |= {name: value, "do_sample": True}
        return chosen


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation by the model's own chat template, ready for the assistant's turn.

    Raises:
        ChatTemplateError: the model has no chat template, or one that cannot be rendered.
    """
    return list(tokenizer(render_chat(tokenizer, messages, prompt=True), add_special_tokens=False).input_ids)


def generate(model: Any, tokenizer: Any, ids: Sequence[int], options: GenerateOptions) -> Generator[str, None, None]:
    """Yields the continuation of a prompt piece by piece, whole characters at a time.

    Stops at every EOS id of the model's generation configuration, at `max_new_tokens`, or when the caller closes the
    iterator. Sampling, stopping and the KV cache are transformers' own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: the prompt's tokens, at least one.
        options: how to choose.

    Raises:
        GenerationError: the prompt is empty or too long.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise GenerationError("the prompt is empty")
    if longest and len(ids) >= longest:
        raise GenerationError(f"the prompt has {len(ids)} tokens; the model takes {longest} in all")
    if longest:
        options = replace(options, max_new_tokens=min(options.max_new_tokens, longest - len(ids)))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failure = threading.Event(), []
    inputs = torch.tensor([list(ids)], device=model.device)

    def work() -> None:
        try:
            set_seed(options.seed)
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=streamer,
                stopping_criteria=[lambda *_, **__: stop.is_set()],
                pad_token_id=_pad_id(model, tokenizer),
                **options.to_transformers(),
            )
        except BaseException as error:  # handed to the caller's thread, whichever it is
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


def _pad_id(model: Any, tokenizer: Any) -> int | None:
    """Some id to pad with; a batch of one is never padded, but transformers warns without."""
    eos = model.generation_config.eos_token_id
    ids = [tokenizer.pad_token_id, model.generation_config.pad_token_id, *(eos if isinstance(eos, list) else [eos])]
    return next((value for value in ids if value is not None), None)
