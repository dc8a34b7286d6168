"""How a training run went: losses, rates, drift, and the spectra before and after, as an HTML page."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sctconv.formats.atomic import atomic_file
from sctconv.formats.reader import SctFile

from . import svg
from .svg import Axis, Line, Markup, grid, section, tag

_POINTS = 48
"""Points of a drawn spectrum."""

_STEPS = 600
"""Steps that are drawn of a curve, at most, evenly spread."""


def write_training_report(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    metrics: str | os.PathLike[str],
    html: str | os.PathLike[str],
    summary: Mapping[str, Any],
) -> None:
    """Draws a run and writes the page, whole or not at all; replaces what stands there.

    Args:
        before, after: the .sct files that went in and came out.
        metrics: the run's .jsonl file, a step a line.
        html: the page.
        summary: what `run` returned.

    Raises:
        FormatError: a file is damaged. OutputError: the page cannot be written.
    """
    steps = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines()]
    with SctFile(before) as one, SctFile(after) as other:
        page = training_report(one, other, steps, summary)
    with atomic_file(html, overwrite=True) as out:
        out.write(page.encode())


def training_report(
    before: SctFile, after: SctFile, steps: Sequence[dict[str, Any]], summary: Mapping[str, Any]
) -> str:
    """The page; self-contained, without scripts."""
    better = f"before {summary['perplexity_before']:.4g}"
    facts = [
        ("held-out perplexity", f"{summary['perplexity']:.4g}", better),
        ("best after", str(summary["best_step"]), f"of {summary['steps']} steps"),
        ("tokens", svg.count(summary["tokens"]), f"{summary['seconds']:.0f} s"),
    ]
    drawn = steps[:: -(-len(steps) // _STEPS)] if steps else []
    charts = [
        *_curve("Loss", "nats a token", drawn, {"loss": "training", "held_out": "held-out"}, steps),
        *_curve("Rates", "share of the full rates", drawn, {"rate": "rate"}, steps),
        *_curve("Gradient", "norm before clipping", drawn, {"gradient": "norm"}, steps),
        *_curve("Drift", "max |XᵀX - I| of U and V", drawn, {"drift": "drift"}, steps),
    ]
    note = "Singular values over the largest, the mean of all layers of a kind: before (blue) and after (orange)."
    return svg.page(
        f"{after.path.name}: training",
        tag("header", tag("h1", after.path.name), tag("p", f"trained from {before.path.name}")),
        section("Result", "", svg.tiles(facts)),
        section("Run", "", svg.legend([(svg.colour(0), "training"), (svg.colour(1), "held-out")]), grid(charts)),
        section("Spectra", note, grid(_spectra(before, after), "panels")),
    )


def _curve(
    title: str, unit: str, drawn: Sequence[dict[str, Any]], keys: Mapping[str, str], steps: Sequence[dict[str, Any]]
) -> list[Markup]:
    """One chart over the steps; a quantity that was looked at only now and then has dots."""
    lines = []
    for place, (key, label) in enumerate(keys.items()):
        seldom = any(step[key] is None for step in steps)
        points = [(step["step"], step[key]) for step in (steps if seldom else drawn) if step[key] is not None]
        if points:
            lines.append(Line(label, points, svg.colour(place), dots=seldom and len(points) <= _STEPS))
    if not lines:
        return []
    x = Axis.linear("step", (x for line in lines for x, _ in line.points), tight=True, whole=True)
    return [svg.line_chart(title, x, Axis.linear(unit, (y for line in lines for _, y in line.points)), lines)]


def _spectra(before: SctFile, after: SctFile) -> Iterable[Markup]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in after.index.layers:
        if name in before.index.layers:
            kinds[name.rpartition(".")[2]].append(name)
    for kind, names in kinds.items():
        lines = [
            Line(label, _mean_spectrum(file, names), svg.colour(place))
            for place, (label, file) in enumerate((("before", before), ("after", after)))
        ]
        values = [y for line in lines for _, y in line.points if y > 0.0]
        if values:
            x = Axis.linear("index / rank", [0.0, 1.0], tight=True)
            yield svg.line_chart(kind, x, Axis.logarithmic("singular value / the largest", values), lines, width=330)


def _mean_spectrum(file: SctFile, names: Iterable[str]) -> list[tuple[float, float]]:
    share = np.linspace(0.0, 1.0, _POINTS)
    curves = []
    for name in names:
        s = file.tensor(f"{name}.s").astype(np.float64)
        if len(s) and s[0] > 0.0:
            curves.append(np.interp(share, np.linspace(0.0, 1.0, len(s)), s / s[0]))
    if not curves:
        return []
    mean = np.maximum(np.mean(curves, axis=0), 1e-12)
    return [(float(x), float(y)) for x, y in zip(share, mean, strict=True)]
