"""What a conversion is planned to take, in memory and on the disk, and what it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sctconv.convert import ConvertOptions, convert
from sctconv.convert.budget import plan_memory
from sctconv.convert.decoder import Decoder
from sctconv.convert.plan import make_plan
from sctconv.errors import OptionError
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.models import save, tiny_model, tiny_tokenizer
from tests.sctconv.calibrating import calibrated_options, source_with_text


def test_a_memory_budget_is_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_with_text("llama", tmp_path)
    with pytest.raises(OptionError, match=r"--max-memory 0.000977GiB: calibration holds .* at least \d\.\d\d GiB"):
        convert(str(source), tmp_path / "o.sct", calibrated_options(source, max_memory=1 << 20))
    assert not list(tmp_path.glob("*.sct*"))
    monkeypatch.setattr("sctconv.convert.budget.rss_bytes", lambda: 500 << 20)  # which grows from call to call
    decoder = Decoder(DenseModel(open_source(str(source))), ["model.layers.0.mlp.up_proj"])
    roomy = plan_memory(decoder, 1000, 64, limit=1 << 40, directory=tmp_path)
    assert roomy.batch == 4 and roomy.spill is None and roomy.estimate < roomy.limit
    tight = plan_memory(decoder, 1 << 40, 64, limit=roomy.estimate, directory=tmp_path)
    assert tight.spill == tmp_path and tight.estimate <= tight.limit
    fast = plan_memory(decoder, 1000, 64, limit=1 << 40, directory=tmp_path, bf16=True)
    assert fast.bf16 and fast.estimate > roomy.estimate
    assert not plan_memory(decoder, 1000, 64, limit=roomy.estimate, directory=tmp_path, bf16=True).bf16


def test_a_large_vocabulary_is_within_the_least_budget_that_is_taken(tmp_path: Path) -> None:
    """Logits of four windows of 512 tokens over 50,000 would be 400 MB, and several times that with their gradient."""
    source = save(tiny_model("llama", vocab_size=50_000), tmp_path / "m")
    tiny_tokenizer(source)
    (tmp_path / "text.txt").write_text("".join(f"{place} times {place} is {place * place}.\n" for place in range(900)))
    command = [sys.executable, "-m", "sctconv", "convert", str(source), "--rank", "4", "--json", "--no-report"]
    command += [
        "--calibration",
        str(tmp_path / "text.txt"),
        "--calibration-tokens",
        "4096",
        "-o",
        str(tmp_path / "o.sct"),
    ]

    def converted(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--max-memory", str(limit)], capture_output=True, text=True)

    least = re.search(r"here at least ([\d.]+) GiB", converted(1 << 20).stderr)
    assert least
    limit = int((float(least[1]) + 0.03) * 2**30)
    done = converted(limit)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] < 1.1 * limit


def test_the_file_is_within_its_target_and_one_rank_more_would_not_be(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    sizes = {}
    for rank in (3, 8):
        options = ConvertOptions(rank=rank, modules="all")
        sizes[rank] = make_plan(DenseModel(open_source(str(source))), options).file_bytes
    report = convert(str(source), tmp_path / "o.sct", ConvertOptions(target_size=sizes[8], modules="all"))
    assert {record.rank for record in report.layers} == {8} and report.bytes <= sizes[8]
    report = convert(str(source), tmp_path / "p.sct", ConvertOptions(target_size=sizes[8] - 1, modules="all"))
    assert {record.rank for record in report.layers} == {7}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{"calibration": ()}, {}, {"allocate": "measured", "refine": 2}], ids=str)
def test_no_file_is_larger_than_planned_nor_much_smaller(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = source_with_text(family, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{place} times {place} is {place * place}.\n" for place in range(600)))
    settings: dict[str, Any] = {
        "rank": 8, "modules": "all", "calibration": (str(text),), "calibration_tokens": 512, "calibration_context": 64, **changes
    }  # fmt: skip
    options = ConvertOptions(**settings)
    planned = make_plan(DenseModel(open_source(str(source))), options).file_bytes
    report = convert(str(source), tmp_path / "o.sct", options)
    assert report.bytes <= planned <= report.bytes + len(report.layers) * 1024 + 16384
