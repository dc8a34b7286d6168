"""How the report looks: elements that escape what they hold, the page, and charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_STYLE: Final = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--text:#1b222d;--muted:#5a6473;--rule:#d5dae2;--accent:#2f6fde;
--c0:#2563c9;--c1:#d1590f;--c2:#14866d;--c3:#b0479b;--c4:#a67c00;--c5:#1f8fb8;--c6:#7455c7;--c7:#c23b4f;--c8:#5f8a1e;--c9:#6b7280}
@media(prefers-color-scheme:dark){:root{--page:#11151b;--card:#1a2029;--text:#e5e9ef;--muted:#9ba6b5;--rule:#38414e;
--accent:#4f8df7;--c0:#6ea0ff;--c1:#ff9a55;--c2:#3fc7a5;--c3:#e588d0;--c4:#e0b83a;--c5:#55c4ea;--c6:#a98bf5;--c7:#ff7f8d;
--c8:#a3d05a;--c9:#a5adba}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.7rem,3vw,2rem) 3rem;max-width:1160px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.4rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .2rem}
p{margin:.2rem 0 .7rem}header p,section>p,figcaption,.legend{color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem;margin:1rem 0}
.tiles div,figure{background:var(--card);border-radius:8px;padding:.6rem .8rem}
dt{color:var(--muted);font-size:.85rem}dd{margin:0;font-size:1.25rem;font-weight:600}
dd small{display:block;font-weight:400;font-size:.8rem;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:.8rem}
.panels{grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr))}
figure{margin:0}figcaption{font-weight:600;font-size:.9rem;margin-bottom:.3rem}
svg{display:block;width:100%;height:auto;overflow:visible}
text{font-size:11px;fill:var(--muted)}.mid{text-anchor:middle}.end{text-anchor:end}
.value{fill:var(--text);pointer-events:none}.inside{fill:var(--page);font-weight:600;pointer-events:none}
.rule{stroke:var(--rule);fill:none}polyline{fill:none;stroke-width:1.3;stroke-linejoin:round}
polyline:hover{stroke-width:3.5}circle{stroke:transparent;stroke-width:7}
.small{font-size:8px}
.legend{font-size:.85rem;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.4rem 0}
.legend span{display:inline-flex;align-items:center}.legend i{width:.8rem;height:.8rem;border-radius:3px;margin-right:.35rem}
.legend i.gradient{width:9rem;margin-left:.4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}th{text-align:left;font-weight:600}
td,th{padding:.18rem .8rem .18rem 0;vertical-align:top;border-bottom:1px solid var(--rule)}
.facts{width:100%}.facts th{color:var(--muted);font-weight:400;width:11rem}.facts th[colspan]{color:var(--text);font-weight:600;
padding-top:.8rem}
.layers td,.layers th{white-space:nowrap;overflow-wrap:normal}.number{text-align:right;font-variant-numeric:tabular-nums}
@media(max-width:520px){.grid:not(.panels,.maps) text{font-size:13.5px}}
summary{cursor:pointer;margin:.4rem 0}
"""

_GRADIENT: Final = ((63, 111, 224), (139, 95, 214), (204, 85, 153), (224, 112, 74), (217, 162, 27))
_COLOURS: Final = 10
"""How many `--cN` the style sheet defines."""

_WIDTH: Final = 460.0
"""Of a chart; a column of the page stretches it."""

_BAND: Final = 16
"""Columns of a heat map that stand beside each other before it goes on in another picture."""

_CELL: Final = (28.0, 22.0)


class Markup(str):
    """HTML. Any other string is text, which `tag` escapes."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: str | float) -> Markup:
    """An element. In the names of attributes a trailing underscore is dropped and others are hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else f"{round(value, 1):g}")}"'
        for key, value in attributes.items()
    )
    inner = "".join(part if isinstance(part, Markup) else escape(part) for part in content)
    return Markup(f"<{name}{given}>" if name == "meta" else f"<{name}{given}>{inner}</{name}>")


def page(title: str, *content: Markup) -> str:
    """A whole HTML page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
        # whatever a file might smuggle in would neither run nor be fetched
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *content), lang='en')}\n"


def section(title: str, note: str, *content: Markup) -> Markup:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title), *([tag("p", note)] if note else []), *content)


def grid(figures: Iterable[Markup], kind: str = "") -> Markup:
    """Figures beside each other as far as there is room."""
    return tag("div", *figures, class_=f"grid {kind}".rstrip())


def tiles(facts: Iterable[tuple[str, str, str]]) -> Markup:
    """Names, values and remarks on them, as tiles."""
    return tag("dl", *(tag("div", tag("dt", a), tag("dd", b, tag("small", c))) for a, b, c in facts), class_="tiles")


def colour(place: int) -> str:
    """One of the colours that tell things apart."""
    return f"var(--c{place % _COLOURS})"


def depth_colour(share: float) -> str:
    """A colour of the gradient from the first block (0) to the last (1)."""
    at = share * (len(_GRADIENT) - 1)
    place = min(int(at), len(_GRADIENT) - 2)
    mixed = (round(a + (b - a) * (at - place)) for a, b in zip(_GRADIENT[place], _GRADIENT[place + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Colours and what they stand for."""
    swatches = [tag("span", tag("i", style=f"background:{fill}"), label) for fill, label in entries]
    return tag("p", *swatches, class_="legend")


def depth_legend(first: int, last: int) -> Markup:
    """The gradient of `depth_colour`."""
    stops = ",".join(depth_colour(place / 4) for place in range(5))
    bar = tag("i", class_="gradient", style=f"background:linear-gradient(90deg,{stops})")
    return tag("p", tag("span", f"block {first}", bar, f"block {last}"), class_="legend")


@dataclass(frozen=True)
class Axis:
    """One direction of a chart; made by `linear` or `logarithmic`.

    Attributes:
        label: what is measured, with the unit.
        low, high: the values at its ends; what lies beyond is drawn there.
        ticks: the values that are marked.
        log: whether equal steps are equal factors.
    """

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @staticmethod
    def linear(label: str, values: Iterable[float], *, tight: bool = False, whole: bool = False) -> Axis:
        """An axis over all values, which ends at ticks; `tight`: at the values; `whole`: with ticks at integers."""
        values = list(values)
        low, high = min(values), max(values)
        size = max(abs(low), abs(high))
        if high - low <= max(1e-12, 1e-6 * size):  # as good as one value
            margin = 0.5 * size if size > 1e-9 else 0.5
            low, high = low - margin, high + margin
        raw = (high - low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * raw)
        step = max(1.0, round(step)) if whole else step
        if not tight:
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        ends = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return Axis(label, low, high, tuple(float(f"{step * place:.9g}") for place in ends))

    @staticmethod
    def logarithmic(label: str, values: Iterable[float]) -> Axis:
        """A logarithmic axis over all values, which are positive."""
        values = list(values)
        first, last = (math.floor(math.log10(value)) for value in (min(values), max(values)))
        marks = [float(f"{factor}e{power}") for power in range(first - 1, last + 3) for factor in (1, 2, 5)]
        low = max(mark for mark in marks if mark <= min(values))
        high = next(mark for mark in marks if mark >= max(values) and mark > low)
        ticks = marks if last - first <= 2 else marks[::3]
        return Axis(label, low, high, tuple(mark for mark in ticks if low <= mark <= high), log=True)

    def at(self, value: float) -> float:
        """How far along the axis a value is, 0 to 1."""
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: shown where the mouse is over it.
        dots: whether each point has a dot, with its value.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = False


def line_chart(
    title: str, x: Axis, y: Axis, lines: Iterable[Line], *, width: float = _WIDTH, height: float = 230
) -> Markup:
    """Lines over common axes, as a figure."""
    left, right, top, bottom = 44.0, width - 14, 26.0, height - 36

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + x.at(point[0]) * (right - left), bottom - y.at(point[1]) * (bottom - top)

    parts = [tag("text", y.label, x=4, y=13)]
    for tick in y.ticks:
        _, at = place((x.low, tick))
        parts.append(tag("path", d=f"M{left:g} {at:.1f}H{right:g}", class_="rule"))
        parts.append(tag("text", f"{tick:g}", x=left - 5, y=at + 4, class_="end"))
    for tick in x.ticks:
        at, _ = place((tick, y.low))
        parts.append(tag("path", d=f"M{at:.1f} {bottom:g}v4", class_="rule"))
        parts.append(tag("text", f"{tick:g}", x=at, y=bottom + 16, class_="mid"))
    parts.append(tag("text", x.label, x=(left + right) / 2, y=height - 4, class_="mid"))
    for line in lines:
        drawn = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in line.points)
        parts.append(tag("polyline", tag("title", line.label), points=drawn, style=f"stroke:{line.colour}"))
        for point in line.points if line.dots or len(line.points) == 1 else ():
            hover = tag("title", f"{line.label}, {x.label} {point[0]:.4g}: {point[1]:.4g}")
            cx, cy = place(point)
            parts.append(tag("circle", hover, cx=cx, cy=cy, r=2.2, style=f"fill:{line.colour}"))
    return _figure(title, parts, width, height)


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        hover: shown where the mouse is over it.
        level: how strong its colour is, 0 to 1; None for an outline alone.
    """

    text: str
    hover: str
    level: float | None = None


def heat_map(columns: Sequence[int | None], rows: Sequence[tuple[str, Sequence[Cell | None]]]) -> list[Markup]:
    """Cells by block (None: outside of blocks) and row, as figures of equal widths that can be read on a phone."""
    figures = -(-len(columns) // _BAND)
    band = -(-len(columns) // figures)
    width, height = _CELL
    longest = max(len(label) for label, _ in rows)
    left = 6.3 * min(longest, 22) + 8
    pictures = []
    for first in range(0, len(columns), band):
        shown = range(first, min(first + band, len(columns)))
        parts = []
        for column in shown:
            head = "–" if columns[column] is None else str(columns[column])
            parts.append(tag("text", head, x=left + (column - first + 0.5) * width, y=13, class_="mid"))
        for row, (label, cells) in enumerate(rows):
            y = 20 + row * height
            name = label if len(label) <= 22 else f"…{label[-21:]}"
            parts.append(tag("text", name, tag("title", label), x=left - 6, y=y + 15, class_="end"))
            parts += [_cell(cell, left + (column - first) * width, y) for column in shown if (cell := cells[column])]
        blocks = [block for block in columns[first : first + band] if block is not None]
        title = f"Blocks {blocks[0]} to {blocks[-1]}" if blocks else "Outside of the blocks"
        pictures.append(_figure(title, parts, left + band * width + 2, 24 + len(rows) * height))
    return pictures


def _cell(cell: Cell, x: float, y: float) -> Markup:
    width, height = _CELL
    level = None if cell.level is None else min(1.0, max(0.0, cell.level))
    look = (
        "fill:none;stroke:var(--rule)" if level is None else f"fill:var(--accent);fill-opacity:{0.1 + 0.55 * level:.2f}"
    )
    box = tag("rect", x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=3, style=look)
    small = " small" if len(cell.text) > 4 else ""
    text = tag("text", cell.text, x=x + width / 2, y=y + 15, class_=f"mid value{small}")
    return tag("g", tag("title", cell.hover), box, text)


@dataclass(frozen=True)
class Part:
    """A part of a bar."""

    label: str
    value: float
    colour: str


def bars(title: str, rows: Sequence[tuple[str, Sequence[Part]]], text: Callable[[float], str]) -> Markup:
    """Stacked horizontal bars on a common scale, with a legend; `text` says a value for people."""
    sums = [sum(part.value for part in parts) for _, parts in rows]
    shapes = []
    for row, ((label, parts), whole) in enumerate(zip(rows, sums, strict=True)):
        y, left = 50.0 * row, 0.0
        shapes.append(tag("text", f"{label} {text(whole)}".strip(), x=0, y=y + 13))
        for part in parts:
            width = _WIDTH * part.value / max(sums)
            said = text(part.value)
            hover = tag("title", f"{part.label}: {said}")
            shapes.append(tag("rect", hover, x=left, y=y + 19, width=width, height=24, style=f"fill:{part.colour}"))
            if width > 7 * len(said):
                shapes.append(tag("text", said, x=left + width / 2, y=y + 35, class_="mid inside"))
            left += width
    shown = {part.label: part for _, parts in rows for part in parts if part.value}.values()
    key = legend((part.colour, f"{part.label} {text(part.value)}") for part in shown)
    return _figure(title, shapes, _WIDTH, 50.0 * len(rows), key)


def count(number: float) -> str:
    """A number for people: `134.5M`."""
    return _scaled(number, ("", "k", "M", "B"))


def size(nbytes: float) -> str:
    """Bytes for people: `98.4 MB`."""
    return _scaled(nbytes, (" B", " kB", " MB", " GB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    step = sum(number >= 1000**power for power in range(1, len(units)))
    return f"{number / 1000**step:.4g}{units[step]}"


def _figure(title: str, parts: Iterable[Markup], width: float, height: float, *below: Markup) -> Markup:
    picture = tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), picture, *below)
