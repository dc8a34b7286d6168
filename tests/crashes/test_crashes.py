"""Commands that are killed, or find no room, at random moments: the short form of `python -m tests.benchmarks.torture`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crashes.torture import FAULTS, KILLS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

COMMANDS = ["convert", "convert, calibrated", "train", "export-onnx"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """In a process of its own, as this one has threads already."""
    command = [sys.executable, "-m", "tests.benchmarks.torture", "--kills", "10", "--seed", "1", "--json"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    return rows


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", [*KILLS, *FAULTS])
def test_whatever_happens_what_stands_is_whole_and_can_be_gone_on_with(
    rows: list[dict[str, Any]], command: str, kind: str
) -> None:
    (row,) = (row for row in rows if (row["command"], row["kind"]) == (command, kind))
    assert row["tried"] > 0
    assert row["failures"] == []


def test_the_blows_hit(rows: list[dict[str, Any]]) -> None:
    for command in COMMANDS:
        hit = [row for row in rows if row["command"] == command and row["kind"] in KILLS]
        assert sum(row["tried"] for row in hit) == 10
        assert sum(row["survived"] for row in hit) < sum(row["tried"] for row in hit) / 2
        assert sum(len(row["stood"]) for row in hit) >= 2, "more than one kind of state was seen"
