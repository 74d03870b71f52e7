"""A drill's report as one HTML file that needs no network: timeline, traffic, next hops, verdict.

Rules: everything is inline SVG made here; text from elsewhere is escaped. One time axis for all
drawings, in seconds from the beginning of the timeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Final

from lbctl.lab.drill.verdict import Check, Evidence, RequestSeen

_BIN_S: Final = 0.25
_WIDTH, _LEFT, _RIGHT = 1000, 150, 20
_ROW: Final = 22
_PALETTE: Final = ("#2563eb", "#059669", "#d97706", "#7c3aed", "#db2777", "#0891b2", "#65a30d")
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; color: #1f2937 }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { text-align: left; padding: .2em 1.2em .2em 0 }
.held { color: #047857 } .failed { color: #b91c1c; font-weight: bold }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #4b5563 }
"""


class _Axis:
    """Seconds to pixels."""

    def __init__(self, seen: Evidence) -> None:
        self.begin_s, self.end_s = seen.began_s, max(seen.ended_s, seen.began_s + 1)

    def x(self, at_s: float) -> float:
        """The place of an instant."""
        share = (at_s - self.begin_s) / (self.end_s - self.begin_s)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def bins(self) -> Iterator[float]:
        """The beginnings of all bins."""
        count = int((self.end_s - self.begin_s) / _BIN_S) + 1
        return (self.begin_s + number * _BIN_S for number in range(count))


@dataclass(frozen=True, slots=True)
class Title:
    """What a report is about. sabotage: what was taken out, "" for nothing."""

    name: str
    about: str
    sabotage: str = ""


def html(title: Title, seen: Evidence, checks: tuple[Check, ...]) -> str:
    """The whole page."""
    axis = _Axis(seen)
    held = all(check.held for check in checks)
    name = f"{title.name}, sabotaged" if title.sabotage else title.name
    verdict = "held" if held else "failed"
    parts = (
        f"<h1>Drill {escape(name)}: <span class={verdict}>{verdict}</span></h1>",
        f"<p>{escape(title.about)}</p>",
        f"<p><b>Sabotage:</b> {escape(title.sabotage)}</p>" if title.sabotage else "",
        _verdicts(checks),
        "<h2>Faults</h2>",
        _faults(axis, seen),
        "<h2>New connections per second</h2>",
        _rates(axis, seen),
        "<h2>Time until the answer</h2>",
        _latencies(axis, seen.requests),
        "<h2>Connections that broke</h2>",
        _breaks(axis, seen),
        "<h2>Next hops in each switch's kernel</h2>",
        _hops(axis, seen),
    )
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _verdicts(checks: Iterable[Check]) -> str:
    rows = "".join(
        f"<tr><td class={'held' if c.held else 'failed'}>{'held' if c.held else 'FAILED'}</td>"
        f"<td>{escape(c.name)}</td><td>{escape(c.wanted)}</td><td>{escape(c.found)}</td></tr>"
        for c in checks
    )
    return (
        f"<table><tr><th></th><th>expectation</th><th>wanted</th><th>found</th></tr>{rows}</table>"
    )


def _svg(height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 1):g}" height="{max(height, 0):g}" '
        f'fill="{colour}"><title>{escape(title)}</title></rect>'
    )


def _ticks(axis: _Axis, height: float) -> Iterator[str]:
    """The time axis under a drawing, at whole seconds."""
    span_s = axis.end_s - axis.begin_s
    step = next((s for s in (1, 2, 5, 10, 30, 60) if span_s / s <= 14), 120)
    first = int(axis.begin_s // step) * step
    for second in range(first, int(axis.end_s) + 1, step):
        if second >= axis.begin_s:
            x = axis.x(second)
            yield f'<path d="M{x:g} 0V{height:g}" stroke="#e5e7eb"/>'
            yield _text(x, height + 14, f"{second} s", "middle")


def _marks(axis: _Axis, seen: Evidence, height: float) -> Iterator[str]:
    for fault in seen.faults:
        x = axis.x(fault.at_s)
        yield f'<path d="M{x:g} 0V{height:g}" stroke="#b91c1c" stroke-dasharray="4 3"/>'


def _faults(axis: _Axis, seen: Evidence) -> str:
    height = _ROW * max(1, len(seen.faults))
    parts = [*_ticks(axis, height)]
    for row, fault in enumerate(seen.faults):
        x, y = axis.x(fault.at_s), row * _ROW
        width = axis.x(fault.done_s) - x
        parts.append(_box(x, y + 5, max(width, 3), _ROW - 10, "#b91c1c", f"{fault.at_s:.2f} s"))
        left = x < _WIDTH * 0.6
        place = max(x + width, x + 3) + 6 if left else x - 6
        parts.append(_text(place, y + 16, fault.text, "start" if left else "end"))
    return _svg(height + 20, parts)


def _binned(axis: _Axis, requests: Iterable[RequestSeen]) -> dict[int, list[RequestSeen]]:
    found: dict[int, list[RequestSeen]] = {}
    for request in requests:
        found.setdefault(int((request.start_s - axis.begin_s) / _BIN_S), []).append(request)
    return found


def _rates(axis: _Axis, seen: Evidence) -> str:
    height = 120.0
    bins = _binned(axis, seen.requests)
    highest = max((len(found) for found in bins.values()), default=1)
    parts = [*_ticks(axis, height), _text(_LEFT - 8, 12, f"{highest / _BIN_S:.0f} /s", "end")]
    for number, begin_s in enumerate(axis.bins()):
        found = bins.get(number, [])
        failed = sum(1 for request in found if request.error)
        x = axis.x(begin_s)
        width = axis.x(begin_s + _BIN_S) - x - 0.5
        good, bad = ((n / highest) * height for n in (len(found) - failed, failed))
        parts.append(_box(x, height - good, width, good, "#2563eb", f"{len(found)} begun"))
        parts.append(_box(x, height - good - bad, width, bad, "#b91c1c", f"{failed} failed"))
    return _svg(height + 20, [*parts, *_marks(axis, seen, height)])


def _latencies(axis: _Axis, requests: tuple[RequestSeen, ...]) -> str:
    height = 120.0
    highest_s = max((request.took_s for request in requests), default=1.0) or 1.0
    parts = [*_ticks(axis, height), _text(_LEFT - 8, 12, f"{highest_s * 1000:.0f} ms", "end")]
    for request in requests:
        x, y = axis.x(request.start_s), height - request.took_s / highest_s * height
        colour = "#b91c1c" if request.error else "#2563eb"
        title = escape(request.error or f"{request.took_s * 1000:.1f} ms")
        parts.append(
            f'<circle cx="{x:g}" cy="{y:.1f}" r="2" fill="{colour}"><title>{title}</title></circle>'
        )
    return _svg(height + 20, parts)


def _breaks(axis: _Axis, seen: Evidence) -> str:
    broken = [flow for flow in seen.flows if flow.broken]
    if not broken:
        return "<p>None.</p>"
    nodes = sorted({flow.node for flow in broken})
    height = float(_ROW * len(nodes))
    parts = [*_ticks(axis, height)]
    for row, node in enumerate(nodes):
        lost = " (dead)" if node in seen.dead else ""
        parts.append(_text(_LEFT - 8, row * _ROW + 16, f"pods on {node or '?'}{lost}", "end"))
        for flow in broken:
            if flow.node == node:
                at = f"{flow.pod}: {flow.broken}, {flow.broken_at_s:.2f} s"
                parts.append(_box(axis.x(flow.broken_at_s), row * _ROW + 4, 2, 14, "#b91c1c", at))
    return _svg(height + 20, [*parts, *_marks(axis, seen, height)])


def _hops(axis: _Axis, seen: Evidence) -> str:
    keys = sorted({(h.service, h.switch, hop) for h in seen.hops for hop in h.hops})
    colours = {
        hop: _PALETTE[i % len(_PALETTE)] for i, hop in enumerate(sorted({k[2] for k in keys}))
    }
    height = float(_ROW * max(1, len(keys)))
    parts = [*_ticks(axis, height)]
    for row, (service, switch, hop) in enumerate(keys):
        parts.append(_text(_LEFT - 8, row * _ROW + 16, f"{service} {switch} → {hop}", "end"))
        for begin_s, end_s in _spans(seen, service, switch, hop, axis.end_s):
            x = axis.x(max(begin_s, axis.begin_s))
            width = axis.x(end_s) - x
            title = f"{begin_s:.2f} s to {end_s:.2f} s"
            parts.append(_box(x, row * _ROW + 5, width, _ROW - 10, colours[hop], title))
    return _svg(height + 20, [*parts, *_marks(axis, seen, height)])


def _spans(
    seen: Evidence, service: str, switch: str, hop: str, end_s: float
) -> Iterator[tuple[float, float]]:
    """When a switch had a next hop."""
    since: float | None = None
    for change in seen.hops:
        if (change.service, change.switch) == (service, switch):
            if hop in change.hops and since is None:
                since = change.at_s
            elif hop not in change.hops and since is not None:
                yield since, change.at_s
                since = None
    if since is not None:
        yield since, end_s
