"""The process that renders chat templates for `chat_template.py`: a JSON object a line in, another out.

It is run as a script and imports nothing of this package. The environment is the one in which transformers renders,
jinja2's `ImmutableSandboxedEnvironment`; where that makes an unsafe attribute undefined, here it is an error.

    python chat_worker.py SECONDS CHARACTERS BYTES
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Answers requests until there are no more."""
    seconds, characters, nbytes = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out, sys.stdout = sys.stdout, sys.stderr  # whatever else prints is no answer
    SandboxedEnvironment.unsafe_undefined = _refuse  # type: ignore[assignment, method-assign]
    _limit_memory(nbytes)
    print("{}", file=out, flush=True)  # ready
    for line in sys.stdin:
        _limit_time(seconds)
        try:
            text = _render(**json.loads(line))
            answer = {"text": text} if len(text) <= characters else {"error": f"writes over {characters} characters"}
        except MemoryError:
            answer = {"error": f"takes over {nbytes >> 20} MiB of memory"}
        except Exception as error:  # a template is a program of its own and raises what it likes
            answer = {"error": f"fails ({type(error).__name__}: {' '.join(str(error)[:1000].split())[:200]})"}
        print(json.dumps(answer), file=out, flush=True)


def _render(template: str, messages: list[dict[str, Any]], prompt: bool, tokens: dict[str, Any]) -> str:
    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **tokens)
    text: str = texts[0]
    return text


def _refuse(environment: SandboxedEnvironment, obj: Any, attribute: str) -> Any:
    raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


def _limit_memory(nbytes: int) -> None:
    """So many bytes of address space more than there are now; only Linux tells and holds it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, used + nbytes))


def _limit_time(seconds: float) -> None:
    """Ends this process when it has worked for longer, also if the one that would kill it is gone."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
