"""The command line: results, JSON, and every mistake in one line with nothing half-written left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.models import save, talking_llama, tiny_tokenizer
from tests.sctconv.command_line import fails, run

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, two shards or more."""
    directory = talking_llama(tmp_path_factory.mktemp("source") / "tiny", stops=[256, 257])
    (directory.parent / "text.txt").write_text(TEXT)
    return directory


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    path = source.parent / "tiny.sct"
    assert run("convert", source, "-o", path, "--rank", 6, "--data-free").exit_code == 0
    return path


# --- results


def test_convert_prints_a_line_a_layer_and_a_plain_warning(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, "-o", tmp_path / "o.sct", "--rank", 6, "--data-free")
    assert result.exit_code == 0
    for layer in range(2):
        for name in ("gate", "up", "down"):
            assert f"model.layers.{layer}.mlp.{name}_proj" in result.stdout
    assert "Truncation without data costs quality" in result.stdout and "peak memory" in result.stdout


def test_convert_json(source: Path, tmp_path: Path) -> None:
    report = json.loads(run("convert", source, "-o", tmp_path / "o.sct", "--rank", 6, "--data-free", "--json").stdout)
    assert {"layers", "output", "bytes", "seconds", "peak_rss_bytes"} <= set(report)
    assert report["bytes"] == (tmp_path / "o.sct").stat().st_size
    assert [layer["rank"] for layer in report["layers"]] == [6] * 6


def test_the_default_output_is_named_after_source_and_rank(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("convert", source, "--ratio", 0.3, "--data-free").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-x0.3.report.html", "tiny-x0.3.sct"]


@pytest.mark.parametrize("rank", [["--rank", "6"], ["--energy", "0.5"]])
def test_dry_run_writes_nothing(source: Path, tmp_path: Path, monkeypatch: Any, rank: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", source, *rank, "--data-free", "--dry-run")
    assert result.exit_code == 0 and "nothing was written" in result.stdout and not list(tmp_path.iterdir())
    plan = json.loads(run("convert", source, *rank, "--data-free", "--dry-run", "--json").stdout)
    assert len(plan["layers"]) == 6
    written = json.loads(run("convert", source, *rank, "--data-free", "--json", "-o", tmp_path / "o.sct").stdout)
    assert written["bytes"] <= plan["bytes"] and plan["dense_bytes"] == written["dense_bytes"]
    assert plan["bytes"] < 1.2 * written["bytes"] or rank[0] == "--energy"  # whose layers are counted as dense


def test_inspect(converted: Path) -> None:
    result = run("inspect", converted, "--tensors")
    assert result.exit_code == 0 and "rank 6" in result.stdout and "model.norm.weight" in result.stdout
    facts = json.loads(run("inspect", converted, "--json").stdout)
    assert {"layers", "tensors", "metadata", "bytes", "parameters", "dense_parameters"} <= set(facts)
    assert facts["bytes"] == converted.stat().st_size
    factored = sum(6 * (32 + 64 + 1) for _ in range(6))
    assert facts["dense_parameters"] - facts["parameters"] == 6 * 32 * 64 - factored


def test_verify(converted: Path) -> None:
    assert "good" in run("verify", converted).stdout
    result = json.loads(run("verify", converted, "--json").stdout)
    assert result["layers"] == 6 and result["orthonormality"] < 1e-5


def test_evaluate_dense_and_factored(source: Path, converted: Path) -> None:
    text = source.parent / "text.txt"
    for model in (source, converted):
        args = ("evaluate", model, "--text", text, "--context", 64, "--max-tokens", 200)
        result = json.loads(run(*args, "--json").stdout)
        assert {"perplexity", "stderr", "tokens", "nll"} <= set(result)
        assert result["tokens"] == 200 - 4 and result["windows"] == 4
        assert f"{result['perplexity']:.6g}" in run(*args).stdout


def test_generate_from_prompt_stdin_and_chat(converted: Path) -> None:
    options = ("--max-new-tokens", 5, "--temperature", 0)
    plain = run("generate", converted, "-p", "Hello", *options)
    assert plain.exit_code == 0 and plain.stdout.endswith("\n")
    assert run("generate", converted, *options, stdin="Hello").stdout == plain.stdout
    chat = run("generate", converted, "-p", "Hello", "--chat", "--system", "Be brief.", *options)
    assert chat.exit_code == 0 and chat.stdout != plain.stdout


# --- mistakes


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the source to damage."""
    import shutil

    return Path(shutil.copytree(source, tmp_path / "copy"))


def _shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


def _lfs(directory: Path) -> None:
    _shard(directory).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")


def _cut(directory: Path) -> None:
    _shard(directory).write_bytes(_shard(directory).read_bytes()[:-100])


def _remove(directory: Path) -> None:
    _shard(directory).unlink()


def _nan(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(_shard(directory))
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, _shard(directory), metadata={"format": "pt"})


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lfs, ["git-lfs pointer", "git lfs pull"]),
        (_cut, ["cut", "bytes are there", "download it again"]),
        (_remove, ["1 of", "shards are missing", "download"]),
        (_nan, ["NaN"]),
        (_no_config, ["config.json"]),
    ],
)
def test_damaged_sources(copy: Path, tmp_path: Path, damage: Any, words: list[str]) -> None:
    damage(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    output = tmp_path / "out"
    output.mkdir()
    fails(run("convert", copy, "-o", output / "o.sct", "--rank", 4, "--data-free"), *words)
    assert list(output.iterdir()) == []
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before, "the source must be untouched"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], ["--rank 0"]),
        (["--rank", "33"], ["--rank 33", "min(out, in)", "32"]),
        (["--rank", "4", "--energy", "0.9"], ["exactly one", "--rank and --energy"]),
        ([], ["exactly one"]),
        (["--rank", "4", "--modules", "no_such_thing"], ["no_such_thing", "none of the 15"]),
    ],
)
def test_wrong_options(source: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    fails(run("convert", source, "-o", tmp_path / "o.sct", *options, "--data-free"), *words, code=2)
    assert list(tmp_path.iterdir()) == []


def test_missing_source(tmp_path: Path) -> None:
    fails(run("convert", tmp_path / "nothing", "--rank", 4, "--data-free"), "nothing", "no such file or directory")


@pytest.mark.parametrize("target", ["/proc/o.sct", "/no/such/directory/o.sct", "."])
def test_unwritable_targets(source: Path, target: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    fails(run("convert", source, "-o", target, "--rank", 4, "--data-free"), target)


def test_no_space_left(source: Path, tmp_path: Path) -> None:
    """A real limit of the operating system, met in the middle of writing."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY));"
    code += "from sctconv.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        str(source),
        "-o",
        str(tmp_path / "o.sct"),
        "--rank",
        "4",
        "--data-free",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
    assert result.returncode == 1 and "limit" in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


_ROOT = Path(__file__).parent.parent.parent


def _text(path: Path, data: bytes) -> None:
    path.write_text("just some text\n" * 20)


def _shortened(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def _empty(path: Path, data: bytes) -> None:
    path.write_bytes(b"")


def _index_flipped(path: Path, data: bytes) -> None:
    path.write_bytes(data[:-200] + bytes([data[-200] ^ 4]) + data[-199:])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_text, ["not a .sct file, but a text file"]),
        (_shortened, ["cut", "bytes are there"]),
        (_empty, ["empty file"]),
        (_index_flipped, ["sha256"]),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damaged_files(converted: Path, tmp_path: Path, command: str, damage: Any, words: list[str]) -> None:
    path = tmp_path / "bad.sct"
    damage(path, converted.read_bytes())
    fails(run(command, path), "bad.sct", *words)


@pytest.mark.parametrize("command", [["evaluate", "--text", "text.txt"], ["generate", "-p", "x"]])
def test_a_cut_file_is_not_run(converted: Path, tmp_path: Path, command: list[str], monkeypatch: Any) -> None:
    path = tmp_path / "bad.sct"
    _shortened(path, converted.read_bytes())
    monkeypatch.chdir(converted.parent)
    fails(run(command[0], path, *command[1:]), "bad.sct", "cut")


def test_one_flipped_bit_in_a_tensor_is_found(converted: Path, tmp_path: Path) -> None:
    data = bytearray(converted.read_bytes())
    data[4096] ^= 1
    path = tmp_path / "bad.sct"
    path.write_bytes(data)
    fails(run("verify", path), "does not match its checksum")


@pytest.mark.parametrize(
    ("content", "words"), [(b"", ["empty"]), (b"\xff\xfe\x00", ["not UTF-8"]), (None, ["No such file"])]
)
def test_bad_texts(converted: Path, tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    text = tmp_path / "t.txt"
    if content is not None:
        text.write_bytes(content)
    fails(run("evaluate", converted, "--text", text), "t.txt", *words)


def test_bad_generation(converted: Path) -> None:
    fails(run("generate", converted, "-p", ""), "prompt is empty")
    fails(run("generate", converted, "-p", "x", "--top-p", 2), "--top-p")
    fails(run("generate", converted, "-p", "x", "--system", "y"), "--system goes with --chat", code=2)
    fails(run("generate", converted, "-p", "x" * 300), "300 tokens")
    fails(run("generate", converted.parent / "none.sct", "-p", "x"), "none.sct")


def test_missing_files(tmp_path: Path) -> None:
    for command in (["inspect"], ["verify"]):
        fails(run(*command, tmp_path / "none.sct"), "none.sct", "No such file")


# --- the process


def _listen_to_interrupts() -> None:
    """A suite that was started in the background of a shell ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("calibrated", [False, True])
def test_interrupting_a_conversion_leaves_what_it_says_it_leaves(calibrated: bool, tmp_path: Path) -> None:
    """A model large enough to be caught in the middle; the signal is sent when the temporary file has appeared.

    With calibration that is in the middle of the sweep.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=4
    )
    source = save(transformers.LlamaForCausalLM(config), tmp_path / "m", shard="100MB")
    out = tmp_path / "out"
    out.mkdir()
    tiny_tokenizer(source)
    (tmp_path / "text.txt").write_text("".join(f"line {place} of a text. " for place in range(4000)))
    text = ["--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "16384"]
    command = [sys.executable, "-m", "sctconv", "convert", str(source), "-o", str(out / "o.sct"), "--rank", "64"]
    command += text if calibrated else ["--data-free"]
    process = subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=_listen_to_interrupts)
    deadline = time.monotonic() + 120
    while not set(out.iterdir()) - {out / ".o.sct.lock"} and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    left = {path.name for path in out.iterdir()}
    kept = f"what is done is kept beside {out / 'o.sct'}; go on with --resume"  # on a slow machine, after a while
    what = kept if left else "nothing half-written was left"
    assert stderr.strip().splitlines()[-1] == f"sctconv: interrupted; {what}"
    assert left <= {"o.sct.part", "o.sct.fits.part"}


def test_a_closed_pipe_is_no_traceback(converted: Path) -> None:
    command = f"{sys.executable} -m sctconv inspect {converted} --json | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=_ROOT, env=os.environ)
    assert "Traceback" not in result.stderr
