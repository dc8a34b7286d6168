"""The HTML report: whole, with nothing from outside, and unmoved by whatever a file claims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sctconv import SctFile
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.errors import ChecksumError, FormatError, OutputError
from sctconv.formats.index import LayerRecord
from sctconv.formats.writer import SctWriter
from sctconv.report.conversion import html_report, write_report
from sctconv.report.svg import Axis
from tests.models import save, tiny_model, tiny_tokenizer

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Parses strictly: every element but `meta` is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.elements, self.attributes = "", set[str](), set[tuple[str, str | None]]()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes.update(attrs)
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += f"{data}\n"


def page_of(path: Path) -> Page:
    with SctFile(path) as file:
        text = html_report(file)
    page = Page(text)
    assert not page.elements & {"script", "img", "link", "iframe", "object", "image", "use", "a"}
    assert not {name for name, _ in page.attributes} & {"src", "href", "xlink:href"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    assert "nan" not in re.findall(r"[a-z]+", " ".join(str(value) for _, value in page.attributes))
    return page


def by_hand(path: Path, metadata: Mapping[str, Any], names: tuple[str, ...] = ("a.0.b",), **spectra: Any) -> Path:
    """A file of layers 6 x 5 at rank 3."""
    with SctWriter(path, metadata=metadata) as writer:
        for name in names:
            writer.add_tensor(f"{name}.U", np.eye(6, 3, dtype=np.float32))
            writer.add_tensor(f"{name}.V", np.eye(5, 3, dtype=np.float32))
            writer.add_tensor(f"{name}.s", np.array(spectra.get("s", [3, 2, 1]), np.float32))
            writer.add_layer(LayerRecord(name, 6, 5, 3, 0.5, 0.5, None, "F32", spectra.get("extra", {})))
        writer.commit()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tiny_model("gpt2", vocab_size=260), tmp_path_factory.mktemp("source") / "tiny-gpt2")
    tiny_tokenizer(directory)
    (directory.parent / "text.txt").write_text("".join(f"Item {n}: {n * n} of {n % 7}.\n" for n in range(600)))
    return directory


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    path = source.parent / "plain.sct"
    convert(str(source), path, ConvertOptions(rank=18, modules="all"))
    return path


@pytest.fixture(scope="module")
def calibrated(source: Path) -> Path:
    path = source.parent / "calibrated.sct"
    texts = (str(source.parent / "text.txt"),)
    options = ConvertOptions(rank=6, modules="mlp", calibration=texts, calibration_tokens=2048, calibration_context=64)
    convert(str(source), path, options)
    return path


def test_a_plain_conversion_shows_every_layer_and_its_energy(plain: Path, source: Path) -> None:
    page = page_of(plain)
    with SctFile(plain) as file:
        index = file.index
        for name, record in index.layers.items():
            assert re.search(rf"\n{re.escape(name)}\n{record.out}\n{record.in_}\n{record.rank}\n", page.text)
            assert f"{record.energy:.4f}" in page.text
        dense = index.metadata["dense_layers"]
    assert dense, "rank 18 would not shrink the square layers of 32"
    assert all(f"{layer['name']}: dense, {layer['reason']}" in page.text for layer in dense)
    for words in (
        "Energy of the weights kept",
        "Error of the weights",
        "attn.c_proj",
        "mlp.c_proj",
        "sha256",
        "Spectra",
    ):
        assert words in page.text
    assert (
        "Energy of the outputs" not in page.text and "perplexity" not in page.text and "hidden states" not in page.text
    )
    assert str(source.parent) not in page.text, "no path of this machine"


def test_a_calibrated_conversion_shows_what_was_measured(calibrated: Path) -> None:
    page = page_of(calibrated)
    with SctFile(calibrated) as file:
        held_out = file.index.metadata["conversion"]["held_out"]
        errors = [record.extra["output_error"] for record in file.index.layers.values()]
    for block, distance in enumerate(held_out["distances"]):
        assert f"hidden states, block {block}: {distance:.4g}" in page.text
    for key in ("perplexity", "teacher_perplexity", "kl"):
        assert f"{held_out[key]:.6g}" in page.text
    assert all(f": {1 - error**2:.4g}\n" in page.text for error in errors), "energy of the outputs is 1 - e^2"
    assert "Energy of the outputs kept" in page.text and "Energy of the weights" not in page.text
    assert "text.txt" in page.text and "attn.c_attn: not selected" in page.text


def test_what_comes_from_the_file_is_never_markup(tmp_path: Path) -> None:
    facts = {
        "generator": HOSTILE,
        "source": {"source": HOSTILE, HOSTILE: HOSTILE, "shards": [{"name": HOSTILE, "sha256": HOSTILE}]},
        "conversion": {HOSTILE: HOSTILE, "calibration": [{"source": HOSTILE, "tokens": HOSTILE}]},
        "dense_layers": [{"name": f"b.1.{HOSTILE}", "reason": HOSTILE}],
    }
    path = by_hand(tmp_path / "<b>'&.sct", facts, (f"a.0.{HOSTILE}", HOSTILE))
    page = page_of(path)
    assert page.text.count(HOSTILE) > 10 and "b" not in page.elements


WRONG: list[Any] = [
    None,
    True,
    3,
    -1e300,
    "x",
    [],
    [None, [1], {"name": 3}, "y"],
    {},
    {"name": [], "source": {}, "k": [3]},
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_metadata_of_wrong_types_is_left_out(wrong: Any, tmp_path: Path) -> None:
    keys = ("generator", "transformers", "source", "conversion", "dense_layers", "parameters", "dense_parameters")
    nested = {
        "source": {"source": wrong, "shards": wrong},
        "conversion": {"calibration": wrong, "held_out": wrong, "rank": wrong},
        "dense_layers": [wrong, {"name": "a.0.c", "out": wrong, "reason": wrong}],
    }
    deep = {"conversion": {"held_out": dict.fromkeys(("distances", "kl", "perplexity", "teacher_perplexity"), wrong)}}
    for place, metadata in enumerate((dict.fromkeys(keys, wrong), nested, deep)):
        page = page_of(by_hand(tmp_path / f"{place}.sct", metadata, extra={"output_error": wrong}))
        assert "a.0.b" in page.text and "Spectra" in page.text


@pytest.mark.parametrize(
    "s", [[0, 0, 0], [math.nan] * 3, [1, math.inf, math.nan], [1, -1, 0], [1, 1e-38, 0], [1, 1, 1]]
)
def test_any_spectrum_can_be_drawn_or_left_out(s: list[float], tmp_path: Path) -> None:
    page = page_of(by_hand(tmp_path / "o.sct", {}, s=s))
    assert ("Spectra" in page.text) == (s[0] == 1)


@pytest.mark.parametrize("name", ["b", "0", "0.1", "..", "a.²", f"a.{'9' * 900}.b", ".".join("a" * 500), "a.99999.b"])
def test_any_name_has_a_place(name: str, tmp_path: Path) -> None:
    assert name in page_of(by_hand(tmp_path / "o.sct", {}, (name, "model.layers.3.up_proj"))).text


def test_a_file_without_tensors_has_a_report(tmp_path: Path) -> None:
    with SctWriter(tmp_path / "o.sct") as writer:
        writer.commit()
    page = page_of(tmp_path / "o.sct")
    assert "Bytes of the file" in page.text and "Ranks" not in page.text


def test_the_page_of_a_large_model_stays_small(tmp_path: Path) -> None:
    blocks, rank = 126, 200
    with SctWriter(tmp_path / "o.sct") as writer:
        for name in (f"model.layers.{block}.mlp.kind_{kind}" for block in range(blocks) for kind in range(7)):
            writer.add_tensor(f"{name}.U", np.zeros((256, rank), np.float32))
            writer.add_tensor(f"{name}.V", np.zeros((256, rank), np.float32))
            writer.add_tensor(f"{name}.s", np.geomspace(1, 1e-3, rank, dtype=np.float32))
            writer.add_layer(LayerRecord(name, 256, 256, rank, 0.5, 0.5, None, "F32", {"output_error": 0.25}))
        writer.commit()
    write_report(tmp_path / "o.sct", tmp_path / "o.html", overwrite=False)
    assert (tmp_path / "o.html").stat().st_size < 2_000_000
    lines = re.findall(r'points="([^"]*)"', (tmp_path / "o.html").read_text())
    assert max(len(line.split()) for line in lines) <= max(64, blocks)


def test_axes_hold_all_values() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        values = (10 ** random.uniform(-9, 8.9) * random.uniform(1, 1 + 10 ** random.uniform(-8, 9), 5)).tolist()
        for axis in (Axis.linear("", values), Axis.linear("", values, tight=True), Axis.logarithmic("", values)):
            assert axis.low <= min(values) * (1 + 1e-9) and max(values) <= axis.high * (1 + 1e-9)
            assert axis.ticks and all(0 <= axis.at(tick) <= 1 for tick in axis.ticks) and len(axis.ticks) < 25
    for values in ([0.0], [5e-324, 0.0], [-1.0, -1.0], [1e-8, 2e-8], [-1e17, 1e9]):
        axis = Axis.linear("", values)
        assert axis.low <= min(values) < axis.high and axis.at(min(values)) < 1 and len(set(axis.ticks)) > 1
    assert Axis.linear("", [0.0, 2.0], whole=True, tight=True).ticks == (0, 1, 2)
    assert Axis.logarithmic("", [1.0]).ticks == (1, 2)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit) and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and all(word in result.stderr for word in words), result.stderr


def test_the_command_line(plain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.sct"
    copy.write_bytes(plain.read_bytes())
    target = tmp_path / "model.report.html"
    result = run("report", copy)
    assert result.exit_code == 0 and result.stdout == f"{target}\n"
    first = target.read_bytes()
    target.write_text("mine")
    fails(run("report", copy), "model.report.html", "--overwrite")
    assert target.read_text() == "mine"
    assert run("report", copy, "--overwrite").exit_code == 0 and target.read_bytes() == first, "the same bytes again"
    assert run("report", copy, "-o", tmp_path / "other.html").stdout == f"{tmp_path / 'other.html'}\n"
    fails(run("report", copy, "-o", copy, "--overwrite"), "is the file to report on")
    assert copy.read_bytes() == plain.read_bytes()
    with pytest.raises(OutputError, match="does not exist"):
        write_report(copy, tmp_path / "no" / "o.html", overwrite=True)


def test_a_damaged_file_is_one_line_and_no_page(plain: Path, tmp_path: Path) -> None:
    data = bytearray(plain.read_bytes())
    with SctFile(plain) as file:
        spectrum = file.entry(f"{next(iter(file.index.layers))}.s")
    (tmp_path / "cut.sct").write_bytes(data[:-100])
    data[spectrum.offset] ^= 1
    (tmp_path / "flipped.sct").write_bytes(data)
    (tmp_path / "text.sct").write_text("hello")
    for name, error in (("cut", FormatError), ("flipped", ChecksumError), ("text", FormatError)):
        fails(run("report", tmp_path / f"{name}.sct"), f"{name}.sct")
        with pytest.raises(error):
            write_report(tmp_path / f"{name}.sct", tmp_path / "o.html", overwrite=False)
    fails(run("report", tmp_path / "missing.sct"), "missing.sct")
    assert not list(tmp_path.glob("*.html"))
