"""The report as one HTML file: the charts of the web pages, with everything they need inside.

It opens from disk without a network. Its content security policy allows the scripts and the style
that stand in it, by their hashes, and nothing else.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from bitquota.report.text import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitquota.canonical import JsonObject

SCRIPTS = (
    "echarts.min.js", "elements.js", "tables.js", "drawings.js", "frontier.js", "plans.js",
    "heat.js", "matrix.js", "comparison.js", "graph.js", "charts.js",
)  # fmt: skip
"""Files of ``assets`` that draw a document, in the order in which they must be loaded."""

_START = """(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  Bitquota.mount(document.getElementById("charts"), read("data"));
})();
"""
_LICENCE = "Draws with Apache ECharts 6 (Apache License 2.0; parts BSD 3-Clause)."


def render_html(document: JsonObject, maps: Mapping[str, JsonObject] | None = None) -> str:
    """Return the report as HTML.

    Args:
        document: From ``charts.document``.
        maps: Maps of cross-layer terms by name, from ``charts.maps_of``.
    """
    style = _asset("style.css")
    scripts = [*(_asset(name) for name in SCRIPTS), _START]
    policy = (
        f"default-src 'none'; script-src {' '.join(_hash(s) for s in scripts)}; "
        f"style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(document | {"cross": dict(maps or {})}, separators=(",", ":"))
    # Inside a script element only this could end it early.
    data = data.replace("<", "\\u003c")
    title = escape(str(document["title"]))
    cards = "".join(_card(plan) for plan in document["plans"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} – Bitquota</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<main>\n<h1>{title}</h1>\n<div class="cards">{cards}</div>\n'
        '<div id="charts"><noscript><p class="problem">The charts of this file need '
        "JavaScript.</p></noscript></div>\n"
        f'<p class="soft">Made by Bitquota. {_LICENCE}</p>\n</main>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _card(plan: JsonObject) -> str:
    measured = plan["measured"]
    size = f"{format_size(plan['size_bits'])}, {plan['effective_bits']:.2f} bits per weight"
    facts = [
        ("Stored weights", size),
        ("Whole model", format_size(plan["model_bits"])),
    ]
    if measured is not None:
        facts.append(("Loss increase", f"{measured['mean']:.3g} ± {measured['error']:.2g}"))
        if measured["accuracy"] is not None:
            share = f"{100 * measured['accuracy']:.2f} % of {measured['samples']} held-out samples"
            facts.append(("Accuracy", share))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return (
        f'<section class="card"><h2>Plan for {escape(plan["budget"])}</h2>'
        f'<p class="headline">{escape(plan["headline"])}</p>'
        f'<p class="soft">{escape(plan["verdict"])}</p><dl class="facts">{rows}</dl>'
        f'<p class="soft">{escape(plan["proof"])}</p></section>\n'
    )


def _asset(name: str) -> str:
    return resources.files("bitquota").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression that allows exactly this inline text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
