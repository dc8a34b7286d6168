"""Ctrl-C and SIGTERM: a command ends soon, with 130 and one line, wherever it is; clean-up is not cut short."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sctconv
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.atomic import part_path
from sctconv.interrupts import interruptible
from tests.models import save, tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals that Windows does not have")

_ROOT = Path(sctconv.__file__).parent.parent

_COMMAND = """if True:
    import signal, sys, time
    import click, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    from sctconv.cli import main
    from sctconv.formats.atomic import atomic_file
    from sctconv.formats.unfinished import last_work

    def long_call():
        print("ready", flush=True)
        torch.linalg.svd(torch.randn(7000, 7000))  # minutes

    @main.command("long")
    @click.argument("output")
    def long(output):
        {body}

    main(["long", sys.argv[1]])
"""

_BODIES = {
    "while it computes": "long_call()",
    "while it writes": """
        with atomic_file(output) as file:
            file.write(b"half")
            file.flush()
            long_call()""",
    "while it waits for a thread": """
        import threading
        thread = threading.Thread(target=long_call, daemon=True)
        thread.start()
        try: thread.join()
        finally: thread.join()""",
    "where it is not heard": """
        print("ready", flush=True)
        try: time.sleep(600)
        except KeyboardInterrupt: time.sleep(600)""",
    "where a library loses it while a file is open": """
        with atomic_file(output) as file:
            print("ready", flush=True)
            try: time.sleep(600)
            except: pass
            time.sleep(600)""",
    "where a library loses it and computes on": """
        with atomic_file(output) as file:
            print("ready", flush=True)
            try: time.sleep(600)
            except: pass
            long_call()""",
    "where a library loses every one": """
        with atomic_file(output) as file:
            print("ready", flush=True)
            while True:
                try: time.sleep(600)
                except: pass""",
}

_CLEANING = {
    "a file is open": """
        with atomic_file(output) as file:
            try: print("ready", flush=True); time.sleep(600)
            finally: time.sleep(3); print("cleaned", flush=True)""",
    "last work": """
        try: print("ready", flush=True); time.sleep(600)
        finally:
            with last_work(): time.sleep(3); print("cleaned", flush=True)""",
}


def _interrupted(program: str, *words: str, number: int = signal.SIGINT) -> tuple[str, str]:
    """What it says on stdout and stderr when it is interrupted as it prints `ready`; it must end long before it would."""
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "ready\n":
                break
        time.sleep(0.2)  # so that it is within the call
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    return out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("where", _BODIES)
def test_a_long_call_does_not_hold_up_the_end(where: str, number: int, tmp_path: Path) -> None:
    program = _COMMAND.format(body=_BODIES[where])
    _, err = _interrupted(program, str(tmp_path / "out"), number=number)
    assert err == "sctconv: interrupted; nothing half-written was left\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", _CLEANING)
def test_cleaning_up_may_take_longer(what: str, tmp_path: Path) -> None:
    out, err = _interrupted(_COMMAND.format(body=_CLEANING[what]), str(tmp_path / "out"))
    assert out.endswith("cleaned\n")
    assert err == "sctconv: interrupted; nothing half-written was left\n"
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_in_a_long_call_keeps_what_is_done_and_says_so(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "llama")
    program = """if True:
        import signal, sys
        import torch
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from sctconv.cli import main
        from sctconv.convert import conversion, pipeline
        pipeline.convert.__kwdefaults__["journal_seconds"] = 0.0
        inner, calls = conversion.truncated_svd, []
        def truncated_svd(*args, **more):
            calls.append(0)
            if len(calls) == 5:
                print("ready", flush=True)
                torch.linalg.svd(torch.randn(7000, 7000))
            return inner(*args, **more)
        conversion.truncated_svd = truncated_svd
        main(["convert", sys.argv[1], "-o", sys.argv[2], "--data-free", "--rank", "6", "--no-report"])
    """
    output = tmp_path / "out" / "o.sct"
    output.parent.mkdir()
    _, err = _interrupted(program, str(source), str(output))
    assert err == f"sctconv: interrupted; what is done is kept beside {output}; go on with --resume\n"
    assert list(output.parent.iterdir()) == [part_path(output)]
    options = ConvertOptions(rank=6)
    convert(str(source), output, options, resume=True)
    convert(str(source), tmp_path / "whole.sct", options)
    assert output.read_bytes() == (tmp_path / "whole.sct").read_bytes()


def test_handlers_are_as_before_afterwards() -> None:
    def handlers() -> list[object]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return [wakeup, threading.active_count(), *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]

    before = handlers()
    with pytest.raises(KeyboardInterrupt), interruptible(str):
        assert handlers() != before
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_a_signal_that_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(str):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_touched() -> None:
    done = []

    def work() -> None:
        with interruptible(str):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
