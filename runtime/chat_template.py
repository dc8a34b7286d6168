"""A conversation as text, by the chat template that came with a model: a program of a stranger.

It is rendered in jinja2's sandbox, by transformers' own function, in a process of its own: no check from within stops a
template that is busy inside one operation (`9 ** (9 ** 9)`, a list that holds itself twice forty times over), a process can
be killed. It is started at the first conversation (about a second) and serves all that follow.

What it cannot stop: where the system does not limit the address space of a process (all but Linux), a template
may take as much memory as it can fill in `SECONDS`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sctconv.formats.errors import SctError

TEMPLATE_BYTES: Final = 1 << 20
"""The most that a template may have. The longest in use have some 20 kB."""
CHARACTERS: Final = 16 << 20
"""The most that it may write: a context of some millions of tokens."""
MEMORY: Final = 1 << 29
"""Address space that it may take, in bytes."""
SECONDS = 10
"""The longest that it may take. Ordinary ones need milliseconds."""
_STARTUP_SECONDS: Final = 120
_WORKER: Final = Path(__file__).with_name("chat_worker.py")


class ChatTemplateError(SctError):
    """A model has no chat template, or one that cannot be rendered within the limits."""


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template` renders it, within the limits above.

    Args:
        tokenizer: its chat template (the one called `default`, if there are several) and special tokens are used.
        messages: objects of JSON with `role` and `content`, at least one.
        prompt: whether to open the assistant's turn at the end.

    Raises:
        ChatTemplateError: there is no template; it is too long, takes too long, writes too much, reaches out of the
            sandbox, or refuses the messages.
    """
    try:
        template = tokenizer.get_chat_template()
    except Exception:  # none, or several of which none is the default
        raise ChatTemplateError("the model has no chat template; generate without --chat") from None
    if not isinstance(template, str) or (nbytes := len(template.encode(errors="replace"))) > TEMPLATE_BYTES:
        size = f"{nbytes} bytes" if isinstance(template, str) else type(template).__name__
        raise ChatTemplateError(f"the chat template is {size}; at most {TEMPLATE_BYTES} bytes of text are rendered")
    request = {
        "template": template,
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "prompt": prompt,
        "tokens": {
            name: list(map(str, token)) if isinstance(token, list | tuple) else str(token)
            for name, token in tokenizer.special_tokens_map.items()
        },
    }
    try:
        line = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"the messages are not JSON ({error}); give role and content as text") from None
    answer = _worker.ask(line)
    if "text" not in answer:
        raise ChatTemplateError(
            f"the chat template {answer['error']}; set another in the tokenizer's files, or give plain text"
        )
    text: str = answer["text"]
    return text


class _Worker:
    """The process that renders: started when needed, killed when it is late."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, line: bytes) -> dict[str, str]:
        """Its answer: `text`, or `error`, which says what the template does wrong."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._process = _start()
                if "error" in (ready := self._exchange(b"", _STARTUP_SECONDS)):
                    return ready
            return self._exchange(line + b"\n", SECONDS)

    def _exchange(self, line: bytes, seconds: float) -> dict[str, str]:
        process, late = self._process, threading.Event()
        assert process is not None and process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it is gone
            pass
        finally:
            timer.cancel()
            timer.join()
            if late.is_set() or not answer.endswith(b"\n"):  # an interrupt has come, too
                self.stop()
        if late.is_set():
            return {"error": f"takes over {seconds:g} s"}
        if not answer.endswith(b"\n"):
            return {"error": f"ends the process that renders it (exit code {process.returncode})"}
        found: dict[str, str] = json.loads(answer)
        return found

    def stop(self) -> None:
        """Ends the process; the next conversation starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    limits = map(str, (SECONDS, CHARACTERS, MEMORY))
    # one thread each, since the stack and heap of every thread count as address space
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


_worker: Final = _Worker()
