#!/usr/bin/env python3
"""Draws saved benchmark output as SVG, with nothing but Python.

  tools/plot_benchmarks.py docs/benchmarks/2026-11-27-h200

reads pair64.json (cuda_pair_bench --heads 64 --json) and layer.json (cuda_layer_bench --json) of that folder and writes
attend.svg, time against batch of dsv4, FlashMLA and the physical floor, and layer.svg, the parts of one layer's decode step,
beside them.
"""
import json
import math
import pathlib
import sys
from xml.sax.saxutils import escape

CASES = [("a", "window of 128"), ("b", "window + 512 selected"), ("c", "window + 1024 selected"),
         ("f", "window + all of 4096")]
SERIES = [("dsv4", "#1f5fbf", ""), ("FlashMLA", "#d1661a", ""), ("floor", "#777777", "5 4")]
STEPS = ["project_in", "norm_q_kv", "project_q", "qnorm_rope_insert", "compress", "index", "select", "attend", "project_out"]
COLOURS = ["#4e79a7", "#a0cbe8", "#59a14f", "#8cd17d", "#b6992d", "#f1ce63", "#e15759", "#1f5fbf", "#9467bd"]
FLOP_PER_US, BYTES_PER_US, LAUNCH_US = 790e6, 4274e3, 2.8  # the floor of cuda_attend_bench


class Svg:
    def __init__(self, width, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                      f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
                      f'<rect width="{width}" height="{height}" fill="white"/>']

    def text(self, x, y, text, anchor="start", size=12, weight="normal"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
                          f'font-weight="{weight}">{escape(text)}</text>')

    def line(self, points, colour, width=1.0, dash=""):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
                          + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")

    def rect(self, x, y, width, height, colour):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def write(self, path):
        path.write_text("\n".join(self.parts + ["</svg>", ""]))
        print(path)


def read_attend(path):
    """{case: [(tokens, dsv4 us, FlashMLA us, floor us)]} of the decode rows."""
    out = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["case"] != "p":
            floor = max(row["flop"] / FLOP_PER_US, row["bytes"] / BYTES_PER_US, LAUNCH_US)
            out.setdefault(row["case"], []).append((row["requests"] * row["s_q"], row["ours_us"], row["flash_mla_us"], floor))
    return out


def draw_attend(folder):
    rows = read_attend(folder / "pair64.json")
    cases = [case for case in CASES if case[0] in rows]
    if not cases:
        sys.exit(f"plot_benchmarks: {folder / 'pair64.json'}: no decode rows")
    panel_width, panel_height, left, top = 330, 200, 60, 66
    svg = Svg(2 * (panel_width + left) + 20, top + 2 * (panel_height + 62))
    svg.text(left, 22, "Attention, decode, 64 heads, fp8_ds_mla rows: time of a call, us", size=15, weight="bold")
    for i, (name, colour, dash) in enumerate(SERIES):
        svg.line([(left + 120 * i, 42), (left + 30 + 120 * i, 42)], colour, 2.5, dash)
        svg.text(left + 36 + 120 * i, 46, name)
    # One scale in all panels: ticks at powers of two.
    all_us = [value for case, _ in cases for row in rows[case] for value in row[1:]]
    low, high = math.floor(math.log2(min(all_us))), math.ceil(math.log2(max(all_us)))
    for i, (case, title) in enumerate(cases):
        x0, y0 = left + (i % 2) * (panel_width + left), top + (i // 2) * (panel_height + 62)
        tokens = [row[0] for row in rows[case]]
        span = math.log2(max(tokens)) or 1

        def place(token, us):
            return (x0 + panel_width * math.log2(token) / span,
                    y0 + 16 + panel_height * (1 - (math.log2(us) - low) / (high - low)))

        svg.text(x0, y0 + 8, f"{case}: {title}", weight="bold")
        for power in range(low, high + 1):
            y = place(1, 2.0 ** power)[1]
            svg.line([(x0, y), (x0 + panel_width, y)], "#dddddd")
            svg.text(x0 - 6, y + 4, f"{2.0 ** power:g}", "end", 10)
        for token in tokens:
            if token & (token - 1) == 0:
                svg.text(place(token, 1)[0], y0 + panel_height + 32, str(token), "middle", 10)
        svg.text(x0 + panel_width / 2, y0 + panel_height + 46, "tokens of the call", "middle", 10)
        for column, (_, colour, dash) in enumerate(SERIES, 1):
            svg.line([place(row[0], row[column]) for row in rows[case]], colour, 2.5, dash)
    svg.write(folder / "attend.svg")


def draw_layer(folder):
    steps = json.loads((folder / "layer.json").read_text())
    shown = [row for row in steps if row["batch"] in (1, 128)]
    left, top, bar, width = 190, 74, 17, 560
    longest = max(max(row["us"], sum(row["steps_us"].values())) for row in shown)
    svg = Svg(left + width + 70, top + len(shown) * (bar + 8) + 20)
    svg.text(10, 22, "One layer's decode step, V4-Flash geometry, us (line: physical floor)", size=15, weight="bold")
    for i, (name, colour) in enumerate(zip(STEPS, COLOURS)):
        x, y = 10 + 150 * (i % 5), 34 + 17 * (i // 5)
        svg.rect(x, y, 11, 11, colour)
        svg.text(x + 16, y + 10, name, size=11)
    for i, row in enumerate(shown):
        y = top + i * (bar + 8)
        svg.text(left - 8, y + 13, f"{row['kind']}, {row['context'] // 1024}k, batch {row['batch']}", "end", 11)
        x = left
        for name, colour in zip(STEPS, COLOURS):
            length = width * row["steps_us"].get(name, 0) / longest
            svg.rect(x, y, length, bar, colour)
            x += length
        svg.text(x + 6, y + 13, f"{row['us']:.0f}", size=11)
        floor = left + width * row["floor_us"] / longest
        svg.line([(floor, y - 3), (floor, y + bar + 3)], "black", 2)
    svg.write(folder / "layer.svg")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    draw_attend(folder)
    draw_layer(folder)


if __name__ == "__main__":
    main()
