"""The report of a .sct file: one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np

from sctconv.formats.atomic import atomic_file, check_target
from sctconv.formats.errors import OutputError
from sctconv.formats.index import Index, LayerRecord
from sctconv.formats.reader import SctFile

from . import svg
from .svg import Axis, Cell, Line, Markup, Part, grid, section, tag

_POINTS: Final = 64
"""Points of a spectrum at most; with `_LINES` it keeps the pages of large models small."""

_LINES: Final = 128
"""Spectra in one panel at most."""

_SHARDS: Final = 6
_NUMBER: Final = re.compile(r"[0-9]{1,4}")


def write_report(sct_path: str | os.PathLike[str], html_path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Writes the report of a .sct file, whole or not at all.

    Raises:
        FormatError: the file is not a whole .sct file, or singular values in it are damaged.
        OutputError: the report exists already, is the file itself, or cannot be written.
        OSError: the file cannot be opened at all.
    """
    target = Path(html_path)
    check_target(target, overwrite=overwrite)
    if target.exists() and target.samefile(sct_path):
        raise OutputError(f"{target}: is the file to report on; choose another name")
    with SctFile(sct_path) as file:
        page = html_report(file)
    with atomic_file(target, overwrite=overwrite) as out:
        out.write(page.encode())


def html_report(file: SctFile) -> str:
    """What a file holds and how good it is, as an HTML page without scripts or anything fetched.

    It shows what index, metadata and singular values say; a section for which they have no values is left out.

    Raises:
        ChecksumError: singular values are damaged.
    """
    layers, metadata = _layers(file.index), file.index.metadata
    factored = [layer for layer in layers if layer.record]
    source = _text(_object(metadata, "source").get("source") or file.path.name)
    return svg.page(
        f"{source} as truncated SVD factors",
        tag("header", tag("h1", source), tag("p", f"{file.path.name}: linear layers as factors W = U diag(s) Vᵀ")),
        _overview(file),
        _ranks(layers),
        _quality(factored, metadata),
        _spectra(file, factored),
        _facts(file),
        _table([layer for layer in layers if layer.record or layer.reason is not None]),
    )


@dataclass(frozen=True)
class _Layer:
    """A linear layer.

    Attributes:
        kind: what layers at the same place of different blocks share: the end of the name, as long as it must be.
        depth: the number of its block; None outside of blocks.
        record: None if it is dense.
        reason: why it is dense; None if it was not selected.
    """

    name: str
    kind: str
    depth: int | None
    record: LayerRecord | None
    reason: str | None

    def measured(self, key: str) -> float | None:
        """A number of the layer's entry in the index, if it has that."""
        return _number(self.record.to_json().get(key)) if self.record else None


def _layers(index: Index) -> list[_Layer]:
    """Every factored layer, every selected one that is dense, and the other matrices of blocks."""
    left = [item for item in _list(index.metadata, "dense_layers") if isinstance(item, dict)]
    reasons = {item["name"]: _text(item.get("reason")) for item in left if isinstance(item.get("name"), str)}
    matrices = (name.removesuffix(".weight") for name, entry in index.tensors.items()
                if name.endswith(".weight") and len(entry.shape) == 2)  # fmt: skip
    names = list(dict.fromkeys([*index.layers, *reasons, *(name for name in matrices if _depth(name) is not None)]))
    kinds = _kinds(names)
    return [_Layer(name, kinds[name], _depth(name), index.layers.get(name), reasons.get(name)) for name in names]


def _depth(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if _NUMBER.fullmatch(part)), None)


def _kinds(names: Iterable[str]) -> dict[str, str]:
    """`up_proj` for every `model.layers.N.mlp.up_proj`; `attn.c_proj` where a block has another `c_proj`."""
    paths = {name: tuple(part for part in name.split(".") if not _NUMBER.fullmatch(part)) or (name,) for name in names}
    ends = {path: [path[-size:] for size in range(1, min(len(path), 5))] for path in paths.values()}
    seen = Counter(end for path in ends for end in ends[path])
    return {name: ".".join(next((end for end in ends[path] if seen[end] == 1), path)) for name, path in paths.items()}


def _share(record: LayerRecord) -> float:
    """The share of the layer's parameters that its factors take."""
    return record.rank * (record.out + record.in_ + 1) / (record.out * record.in_)


def _overview(file: SctFile) -> Markup:
    """The main numbers, and bars of bytes and parameters."""
    records, tensors = file.index.layers.values(), file.index.tensors.values()
    names = {name for record in records for name in record.factors}
    blobs = {(entry.offset, entry.nbytes): entry for entry in tensors}.values()  # tied tensors share one
    factors, others = ([entry for entry in blobs if (entry.name in names) is wanted] for wanted in (True, False))
    now, rest = (sum(math.prod(entry.shape) for entry in entries) for entries in ([*factors, *others], others))
    dense = rest + sum(record.out * record.in_ for record in records)
    nbytes = [sum(blob.nbytes for blob in kind) for kind in (factors, others, file.index.files.values())]
    labels = ("factors", "other tensors", "embedded files", "index and padding")
    kinds = zip(labels, [*nbytes, file.nbytes - sum(nbytes)], strict=True)
    parts = [Part(label, size, svg.colour(place)) for place, (label, size) in enumerate(kinds)]
    charts = [svg.bars("Bytes of the file", [("", parts)], svg.size)]
    if dense:
        other = Part("other tensors", rest, svg.colour(1))
        here = Part("factors", now - rest, svg.colour(0))
        before = Part("the same layers, dense", dense - rest, svg.colour(9))
        charts.append(svg.bars("Parameters", [("here", [here, other]), ("dense", [before, other])], svg.count))
    held_out = _object(_object(file.index.metadata, "conversion"), "held_out")
    perplexity, teacher, kl = (_number(held_out.get(key)) for key in ("perplexity", "teacher_perplexity", "kl"))
    tuned = _number(held_out.get("tuned_perplexity"))
    perplexity = perplexity if tuned is None else tuned
    tiles = [
        ("parameters", svg.count(now), f"{now / dense:.1%} of {svg.count(dense)}" if dense else ""),
        ("file", svg.size(file.nbytes), f".sct {file.head.major}.{file.head.minor}"),
        ("layers factored", str(len(records)), ""),
    ]
    if perplexity is not None:
        beside = "" if teacher is None else f"dense model {teacher:.4g}"
        tiles.append(("held-out perplexity", f"{perplexity:.4g}", beside))
    if kl is not None:
        tiles.append(
            (
                "KL from the dense model",
                f"{kl:.3g}",
                "nats a token, held-out" if tuned is None else "nats a token, before tuning",
            )
        )
    return section("Size", "", svg.tiles(tiles), grid(charts))


def _ranks(layers: list[_Layer]) -> Markup:
    if not layers:
        return Markup()
    cells: dict[tuple[str, int | None], list[_Layer]] = defaultdict(list)
    for layer in layers:
        cells[layer.kind, layer.depth].append(layer)
    depths = sorted({layer.depth for layer in layers}, key=lambda depth: math.inf if depth is None else depth)
    rows = [(kind, [_cell(cells.get((kind, depth), [])) for depth in depths]) for kind in _in_order(layers)]
    note = (
        "The rank of each layer, by block (across) and kind of layer (down). The stronger the colour, the more of the "
        "layer's parameters the factors take. Empty boxes: not selected, so dense."
    )
    return section("Ranks", note, grid(svg.heat_map(depths, rows), "maps"))


def _in_order(layers: Iterable[_Layer]) -> list[str]:
    return list(dict.fromkeys(layer.kind for layer in layers))


def _cell(layers: list[_Layer]) -> Cell | None:
    """A cell for the layers of one kind in one block: one, or the experts of a mixture."""
    if not layers:
        return None
    name = layers[0].name + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
    records = [layer.record for layer in layers if layer.record]
    if not records:
        reason = layers[0].reason
        return Cell("", f"{name}: not selected") if reason is None else Cell("dense", f"{name}: dense, {reason}")
    ranks = sorted(record.rank for record in records)
    one = ranks[0] == ranks[-1]
    share = fmean(map(_share, records))
    shape = f"{records[0].out} x {records[0].in_}"
    hover = f"{name}: {shape}, rank {ranks[0] if one else f'{ranks[0]} to {ranks[-1]}'}, {share:.1%} of its parameters"
    return Cell(str(ranks[0]) if one else f"~{fmean(ranks):.0f}", hover, share)


def _quality(factored: list[_Layer], metadata: dict[str, Any]) -> Markup:
    measures = [
        ("output_error", "Energy of the outputs kept, on calibration tokens", "1 − e², e the relative output error"),
        ("energy", "Energy of the weights kept", "share of ‖W‖²"),
        ("error", "Error of the weights", "‖W − U diag(s) Vᵀ‖ / ‖W‖"),
    ]
    fills = {kind: svg.colour(place) for place, kind in enumerate(_in_order(factored))}
    charts = []
    for key, title, unit in measures:
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for layer in factored:
            if layer.depth is not None and (value := layer.measured(key)) is not None:
                values[layer.kind][layer.depth].append(1 - value**2 if key == "output_error" else value)
        charts += _over_blocks(title, unit, [
            Line(kind, [(float(depth), fmean(found)) for depth, found in sorted(blocks.items())], fills[kind], dots=True)
            for kind, blocks in values.items()
        ])  # fmt: skip
    colours = svg.legend((fill, kind) for kind, fill in fills.items()) if charts else Markup()
    distances = enumerate(_list(_object(_object(metadata, "conversion"), "held_out"), "distances"))
    states = [(float(block), value) for block, item in distances if (value := _number(item)) is not None]
    charts += _over_blocks(
        "Error through depth, on held-out tokens",
        "distance of the hidden states, |this − dense| / |dense|",
        [Line("hidden states", states, "var(--text)", dots=True)] if states else [],
    )
    if not charts:
        return Markup()
    note = "Energy is the square of the norm; where all of it is kept, nothing is lost."
    if any(layer.measured("output_error") is not None for layer in factored):
        note += " Calibrated factors are fitted to the outputs of a layer; its weight is then matched less well."
    return section("Quality by depth", note, colours, grid(charts))


def _over_blocks(title: str, unit: str, lines: list[Line]) -> list[Markup]:
    points = [point for line in lines for point in line.points]
    if not points:
        return []
    x = Axis.linear("block", (x for x, _ in points), tight=True, whole=True)
    return [svg.line_chart(title, x, Axis.linear(unit, (y for _, y in points)), lines)]


def _spectra(file: SctFile, factored: list[_Layer]) -> Markup:
    depths = [layer.depth for layer in factored if layer.depth is not None]
    panels: dict[str, list[Line]] = {}
    for kind in _in_order(factored):
        layers = [layer for layer in factored if layer.kind == kind]
        every = -(-len(layers) // _LINES)
        panels[kind] = [line for layer in layers[::every] for line in _spectrum(file, layer, max(depths, default=0))]
    y_values = [y for lines in panels.values() for line in lines for _, y in line.points]
    if not y_values:
        return Markup()
    y = Axis.logarithmic("singular value / the largest, log scale", y_values)
    charts = []
    for kind, lines in panels.items():
        ends = [line.points[-1][0] for line in lines]
        x = Axis.linear("index / full rank, min(out, in)", [0.0, max(ends, default=1.0)], tight=True)
        charts += [svg.line_chart(kind, x, y, lines, width=330)] if lines else []
    note = "The singular values of the factors, a line for each layer, as far as the layer's rank."
    key = svg.depth_legend(min(depths), max(depths)) if depths else Markup()
    return section("Spectra", note, key, grid(charts, "panels"))


def _spectrum(file: SctFile, layer: _Layer, last: int) -> list[Line]:
    """Singular values over the largest against the share of the full rank, if there is anything to draw."""
    entry = file.entry(f"{layer.name}.s")
    file.verify(entry)
    s = file.tensor(entry.name).astype(np.float64)
    places = np.unique(np.linspace(0, len(s) - 1, min(len(s), _POINTS)).round().astype(int))
    with np.errstate(all="ignore"):
        shares = s / s[0]
    full = min(layer.record.out, layer.record.in_) if layer.record else len(s)
    points = [((place + 1) / full, shares[place]) for place in places.tolist() if 1e-9 <= shares[place] <= 1e9]
    fill = "var(--muted)" if layer.depth is None else svg.depth_colour(layer.depth / max(1, last))
    return [Line(layer.name, points, fill)] if points else []


def _facts(file: SctFile) -> Markup:
    metadata = file.index.metadata
    source, conversion = _object(metadata, "source"), _object(metadata, "conversion")
    shards = [item for item in _list(source, "shards") if isinstance(item, dict)]
    texts = [item for item in _list(conversion, "calibration") if isinstance(item, dict)]
    groups = {
        "Source": [
            *_rows(source),
            *(
                ("shard", f"{_text(item.get('name'))}, sha256 {_text(item.get('sha256'), 16)}")
                for item in shards[:_SHARDS]
            ),
            *([("", f"and {len(shards) - _SHARDS} more shards")] if len(shards) > _SHARDS else []),
        ],
        "Conversion": [
            *_rows(conversion),
            *_rows({"made by": metadata.get("generator"), "transformers": metadata.get("transformers")}),
        ],
        "Calibration": [(_text(item.get("source")), f"{_text(item.get('tokens'))} tokens") for item in texts],
        "Held-out calibration tokens": _rows(_object(conversion, "held_out"), {"kl": "KL, nats a token"}),
    }
    body = []
    for group, rows in groups.items():
        body += [tag("tr", tag("th", group, colspan="2"))] if rows else []
        body += [tag("tr", tag("th", key, scope="row"), tag("td", value)) for key, value in rows]
    return section("Facts", "", tag("table", tag("tbody", *body), class_="facts")) if body else Markup()


def _rows(facts: dict[str, Any], labels: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """The facts that are plain values."""
    named = labels or {}
    return [
        (named.get(key, _text(key.replace("_", " "))), _text(value))
        for key, value in facts.items() if isinstance(value, str | int | float)
    ]  # fmt: skip


def _table(layers: list[_Layer]) -> Markup:
    columns = (
        "layer",
        "out",
        "in",
        "rank",
        "parameters kept",
        "output error",
        "weight energy",
        "weight error",
        "dtype",
    )
    rows = []
    for layer in layers:
        if (record := layer.record) is None:
            cells = [tag("td", f"dense: {layer.reason}", colspan=str(len(columns) - 1))]
        else:
            values = (layer.measured(key) for key in ("output_error", "energy", "error"))
            measured = ("–" if value is None else f"{value:.4f}" for value in values)
            shown = (str(record.out), str(record.in_), str(record.rank), f"{_share(record):.1%}", *measured)
            cells = [*(tag("td", text, class_="number") for text in shown), tag("td", record.dtype)]
        rows.append(tag("tr", tag("td", layer.name), *cells))
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="layers")
    opener = tag("summary", f"All {len(layers)} selected layers")
    return section("Layers", "", tag("details", opener, tag("div", table, class_="scroll")))


def _object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """What should be an object; metadata is free, so it may be anything."""
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _list(parent: dict[str, Any], key: str) -> list[Any]:
    value = parent.get(key)
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """What should be a number, if it is one that can be drawn."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if fits else None


def _text(value: Any, most: int = 200) -> str:
    """A value of the metadata as text of limited length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"
