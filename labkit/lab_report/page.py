"""The page of a lab report, report.html: the facts and the student's words in one file that needs nothing else and executes nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from labkit.html_page import template
from labkit.lab_report.parts import PARTS, TITLE

PAGE = "report.html"
_STYLE = """
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #767676; }
h3 { font-size: 1rem; line-height: 1.3; margin: 1.5rem 0 .2rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #bbb; }
thead .number { white-space: normal; overflow-wrap: normal; }
tbody th { font-weight: normal; min-width: 4.5rem; }
.number:last-child { padding-right: 0; }
img { max-width: min(100%, 42rem); height: auto; }
.prompt { color: #444; font-style: italic; }
.words { white-space: pre-wrap; border-left: 4px solid #0072B2; padding: .1rem 0 .1rem .9rem; margin: .6rem 0; }
.gap { border: 2px dashed #A33; padding: .5rem .9rem; }
@media screen and (max-width: 40rem) {
main { padding: 1rem; }
th, td { padding-right: .8rem; }
.many thead { display: none; }
.many, .many tbody, .many tr, .many th, .many td { display: block; text-align: left; white-space: normal; border: 0; padding: .05rem 0; }
.many tr { border-bottom: 1px solid #bbb; padding: .3rem 0; }
.many th { font-weight: bold; }
.many td::before { content: attr(data-label) ": "; color: #444; }
}
@media print { main { max-width: none; padding: 0; } tr, figure { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
_PAGE = """{% macro piece_of(piece) %}
{% if piece.data is defined %}
<figure><img src="data:image/png;base64,{{ coded(piece.data) }}" alt="{{ piece.alt }}"></figure>
{% else %}
<h3>{{ piece.caption }}</h3>
<table aria-label="{{ piece.caption }}"{% if piece.head | length > 4 %} class="many"{% endif %}>
{% if piece.head %}
<thead><tr>
{% for label in piece.head %}
<th scope="col"{% if not loop.first %} class="number"{% endif %}>{{ label }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in piece.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td{% if piece.head %} class="number" data-label="{{ piece.head[loop.index] }}"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% endmacro %}
{% macro words_in(name) %}
{% for text in words.get(name, []) %}
<div class="words" dir="auto">{{ text }}</div>
{% endfor %}
{% endmacro %}
<h1>{{ heading }}</h1>
{% if author %}<p dir="auto">{{ author }}</p>{% endif %}
{{ words_in("title") }}
{% for name, part in parts.items() %}
<section id="{{ name }}">
<h2>{{ part.title }}</h2>
{% if part.call and name not in shown %}<p class="gap">Not recorded: report.{{ part.call }} does it.</p>{% endif %}
{% for piece in shown.get(name, []) %}
{{ piece_of(piece) }}
{% endfor %}
<p class="prompt">{{ part.prompt }}</p>
{% if name in words %}{{ words_in(name) }}{% else %}<p class="gap">Nothing is written here yet.</p>{% endif %}
</section>
{% endfor %}
<section id="marking">
<h2>How this report is marked</h2>
{% for piece in shown.marking %}
{{ piece_of(piece) }}
{% endfor %}
{{ words_in("marking") }}
</section>
"""


def page_of(author: str, shown: Mapping, words: Mapping) -> str:
    """The report as HTML; whatever is put in is cleaned and escaped.

    shown: part -> tables and pictures, without parts that are not recorded; "marking" is the end.   words: part -> the student's texts.
    """
    return template(_PAGE, _STYLE).render(
        heading=TITLE, author=author, parts=PARTS, shown=shown, words=words, coded=lambda data: base64.b64encode(data).decode())


def without_pictures(page: str) -> str:
    """Pictures have the same look, and not the same bytes, under every version of matplotlib."""
    return re.sub(r'src="data:[^"]*"', "", page)
