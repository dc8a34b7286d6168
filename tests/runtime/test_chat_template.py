"""Chat templates: rendered as transformers renders them, in its sandbox, and stopped when they are hostile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from sctconv.runtime import chat_template
from sctconv.runtime.chat_template import ChatTemplateError, render_chat
from sctconv.runtime.generate import chat_ids
from tests.models import tiny_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <end>"},
    {"role": "user", "content": "Größe\u2028\ud800?", "x": None},
]
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}{{ eos_token }}"""
NAMESPACES = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}
{% endif %}{% if loop.index0 == 7 %}{% break %}{% endif %}{% endfor %}{{ messages[:2] | tojson }} {{ ns.last }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}
{% generation %}{{ messages[-1].x is defined }}{% endgeneration %}"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def one_line(tokenizer: Any, template: Any) -> str:
    """The message with which a template is refused."""
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError) as caught:
        render_chat(tokenizer, [{"role": "user", "content": "Hi"}], prompt=True)
    message = str(caught.value)
    assert "\n" not in message and "chat template" in message and len(message) < 400
    return message


def still_works(tokenizer: Any) -> bool:
    tokenizer.chat_template = "{{ messages[0].content }}"
    return render_chat(tokenizer, [{"role": "user", "content": "Hi"}], prompt=True) == "Hi"


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, NAMESPACES, None])
def test_a_conversation_is_rendered_as_transformers_does(tokenizer: Any, template: str | None, prompt: bool) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(tokenizer, MESSAGES, prompt=prompt) == expected


def test_of_several_templates_the_default_is_taken(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": "tools", "default": "{{ messages[0].role }}"}
    assert render_chat(tokenizer, MESSAGES, prompt=True) == "system"
    assert "no chat template" in one_line(tokenizer, {"tool_use": "tools", "other": "o"})


def test_transformers_renders_in_the_immutable_sandbox() -> None:
    assert isinstance(_compile_jinja_template("x").environment, ImmutableSandboxedEnvironment)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__ }}", r"access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages | attr('__class__') }}", "unsafe"),
        ("{{ messages['__class__'] }}", "unsafe"),
        ("{{ '{0.__class__}'.format(messages) }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{% import 'os' as os %}", "TypeError"),
        ("{% raise %}", "TemplateSyntaxError"),
        ("{{ raise_exception('two\\nlines ' * 9999) }}", "two lines two"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' * (17 * 2**20) }}", "writes over 16777216 characters"),
        ("{{ 'a' * 10**9 }}", "takes over 512 MiB of memory"),
        ("{{ 'a' | center(10**9) }}", "takes over 512 MiB"),
        ("{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}", "512 MiB"),
        ("{{ [0] * 10**9 }}", "512 MiB"),
        ("{" * 10**6 + "{" * 10**5, "is 1100000 bytes; at most 1048576"),
        (["{{ 1 }}"], "is list; at most"),
        (None, "the model has no chat template; generate without --chat"),
    ],
)
def test_a_hostile_or_missing_template_is_one_line(tokenizer: Any, template: Any, message: str) -> None:
    assert message in one_line(tokenizer, template)
    assert still_works(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",  # yields nothing
        "{{ 9 ** (9 ** 9) }}",  # one operation
        "{% set ns = namespace(a=[0]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
        "{% set m = namespace(a=[0]) %}{% for i in range(40) %}{% set m.a = [m.a, m.a] %}{% endfor %}{{ ns.a == m.a }}",
    ],
)
def test_a_template_that_takes_too_long_is_stopped(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert still_works(tokenizer)  # the process stands, so that only the template is waited for
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    assert "the chat template takes over 0.5 s" in one_line(tokenizer, template)
    monkeypatch.undo()
    assert still_works(tokenizer)


def test_a_process_that_is_gone_is_replaced(tokenizer: Any) -> None:
    assert still_works(tokenizer)
    process = chat_template._worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert still_works(tokenizer)


def test_a_process_that_does_not_start_is_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    chat_template._worker.stop()
    monkeypatch.setattr(chat_template, "_WORKER", tmp_path / "worker.py")
    assert "ends the process that renders it (exit code 3)" in one_line(tokenizer, "x")
    monkeypatch.undo()
    assert still_works(tokenizer)


def test_an_interrupt_leaves_no_answer_behind(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert still_works(tokenizer)
    tokenizer.chat_template = "an answer that nobody reads"

    process = chat_template._worker._process
    assert process is not None and process.stdout is not None
    monkeypatch.setattr(process, "stdout", _Interrupted(process.stdout))
    with pytest.raises(KeyboardInterrupt):
        render_chat(tokenizer, MESSAGES, prompt=True)
    assert still_works(tokenizer)


class _Interrupted:
    """A pipe at which Ctrl-C comes."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def readline(self) -> bytes:
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def test_threads_may_render_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    found: dict[str, str] = {}

    def work(text: str) -> None:
        for _ in range(20):
            found[text] = render_chat(tokenizer, [{"role": "user", "content": text}], prompt=True)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {str(number): str(number) for number in range(8)}


def test_messages_that_are_not_json_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ChatTemplateError, match="the messages are not JSON"):
        render_chat(tokenizer, [{"role": "user", "content": time}], prompt=True)


def test_chat_ids_are_the_rendered_template(tokenizer: Any) -> None:
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "user: Hi<end>assistant:"
