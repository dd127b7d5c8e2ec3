"""The frame of an HTML page that needs nothing else and executes nothing, whoever's words are in it. What is said on a page is in other files."""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from markupsafe import Markup

STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
table { border-collapse: collapse; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
"""
_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ heading }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{% block main %}{% endblock %}
</main>
</body>
</html>
"""


def clean(text: str) -> str:
    """A text without control characters and marks that turn the direction of writing; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text.replace("\r\n", "\n").replace("\t", "    "))


@cache
def template(source: str, style: str, finalize=clean, filters: tuple = ()):
    """A page's template, compiled once: `source` is what stands in the frame; `render` takes `heading` and whatever the source names.

    style: rules after those of `STYLE`.   finalize: text -> text for whatever is put in, which is also escaped.
    filters: functions that the source names.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, loader=DictLoader({"frame": _FRAME}),
        finalize=lambda value: finalize(value) if isinstance(value, str) and not isinstance(value, Markup) else value)
    digest = base64.b64encode(hashlib.sha256((STYLE + style).encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals |= {"style": Markup(STYLE + style), "policy": Markup(policy)}
    return environment.from_string('{% extends "frame" %}{% block main %}' + source + "{% endblock %}")
