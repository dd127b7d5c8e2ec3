"""The notebook of a lab report, report.ipynb: our cells of facts, made anew each time, among the student's own, which stay as they are."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from labkit.errors import UserError
from labkit.html_page import clean
from labkit.lab_report.parts import PARTS, TITLE
from labkit.lab_report.record import RECORD, replace_text
from labkit.lab_report.tables import Picture

NOTEBOOK, GAP = "report.ipynb", "YOUR WORDS HERE"
# Made once, with the notebook; like every cell that is not marked as ours it is the student's.
_LAST_CELL = '''from labkit.lab_report import LabReport

report = LabReport(".")
page, _ = report.build()
print(page.resolve(), *report.check(), sep="\\n")'''
_OURS = "labkit"  # the metadata of a cell that we made: {"facts": name, "digest": ...} or {"gap": name}


def read_notebook(path: Path):
    """The student's notebook, or one with nothing in it but the cell that makes the page.   Raises UserError where it cannot be read."""
    import nbformat

    if not path.exists():
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}, "language_info": {"name": "python"}}
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(_LAST_CELL)], metadata=kernel)
    try:
        notebook = nbformat.v4.upgrade(nbformat.read(path, as_version=4))
        nbformat.validate(notebook)
    except Exception as error:  # nbformat has its own kinds, and jsonschema's, beside JSON's
        raise UserError(f"{path} is no readable notebook ({' '.join(str(error).split())[:120]}): mend it, or move it away to begin with an empty "
                        f"one; nothing was written over it") from error
    return notebook


def write_notebook(path: Path, notebook) -> None:
    """Keep the notebook; a file that says the same already is not touched, since it may be open."""
    import nbformat

    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        replace_text(path, text)


def facts_of(author: str, shown: Mapping) -> dict[str, tuple[str, list[Picture]]]:
    """Name -> (Markdown, pictures) of the cells that we make, in their order; after that of each part comes the student's.

    shown: part -> tables and pictures, without parts that are not recorded; "marking" is the end.
    """
    author = f"{_markdown(author)}\n\n" if author else ""
    facts = {"title": (f"# {TITLE}\n\n{author}Numbers come from `{RECORD}`; words are yours, and the page shows them as you type them. Write where "
                       f"it says {GAP}, save, and run the last cell, or `python -m labkit report` on this folder: it makes the page and says what "
                       f"is missing.", [])}
    for name, part in PARTS.items():
        pieces = shown.get(name, [])
        missing = [f"**Not recorded yet:** `report.{part.call}` does it."] if part.call and not pieces else []
        lines = [f"## {part.title}", *missing, *map(_markdown_piece, pieces), f"*{part.prompt} At least {part.words} words.*"]
        facts[name] = "\n\n".join(lines), [piece for piece in pieces if isinstance(piece, Picture)]
    facts["marking"] = "\n\n".join(["## How this report is marked", *map(_markdown_piece, shown["marking"])]), []
    return facts


def with_facts(notebook, facts: Mapping):
    """Put our cells into the notebook, where they stand already or, where one is missing, after what it belongs behind; likewise missing gaps.

    A cell of ours that the student has changed becomes the student's.
    """
    cells, place = notebook.cells, 0
    for cell in cells:
        if _OURS in cell.metadata and _about(cell) is None:
            for name in (_OURS, "editable", "deletable"):
                cell.metadata.pop(name, None)
    for name, (source, pictures) in facts.items():
        for about in [("facts", name), ("gap", name)][: 2 if name in PARTS else 1]:
            found = [i for i, cell in enumerate(cells) if _about(cell) == about]
            if not found:
                found = [place]
                cells.insert(place, _new_cell(*about))
            if about[0] == "facts":
                for i in found:
                    _say(cells[i], source, pictures)
            place = found[-1] + 1
    return notebook


def _new_cell(kind, name):
    import nbformat

    locked = {"editable": False} if kind == "facts" else {}
    return nbformat.v4.new_markdown_cell(GAP, metadata={_OURS: {kind: name}, "deletable": False, **locked})


def _say(cell, source, pictures):
    cell.source = source
    cell.metadata[_OURS]["digest"] = _digest(source)
    cell.attachments = {f"{p.name}.png": {"image/png": base64.b64encode(p.data).decode()} for p in pictures}


def _about(cell):
    """("facts" or "gap", name) of a cell that we made, or None; None, too, for facts that are not as we made them."""
    ours = cell.metadata.get(_OURS)
    for kind in ("facts", "gap"):
        if isinstance(ours, Mapping) and ours.get(kind) in [*PARTS, "title", "marking"]:
            return (kind, ours[kind]) if kind == "gap" or ours.get("digest") == _digest(cell.source) else None
    return None


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stale(notebook, facts: Mapping) -> list[str]:
    """Names of the cells of facts that are missing in the notebook or say something else."""
    said = {_about(cell): cell.source for cell in notebook.cells}
    return [name for name, (source, _) in facts.items() if said.get(("facts", name)) != source]


def words_of(notebook) -> dict[str, list[str]]:
    """Part -> what the student has written there, a text for each Markdown cell; "title" and "marking" for what stands before and after all."""
    found, name = {}, "title"
    for cell in notebook.cells:
        kind, name = _about(cell) or (None, name)
        text = cell.source.replace(GAP, "").strip()
        if kind != "facts" and cell.cell_type == "markdown" and text:
            found.setdefault(name, []).append(text)
    return found


def _markdown_piece(piece):
    if isinstance(piece, Picture):
        return f"![{_markdown(piece.alt)}](attachment:{piece.name}.png)"
    head = [piece.head, ["---", *["---:"] * (len(piece.head) - 1)]] if piece.head else [["", ""], ["---", "---"]]
    lines = [*head, *([_markdown(cell) for cell in row] for row in piece.rows)]
    return f"**{_markdown(piece.caption)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(text):
    """A text as Markdown shows it: what could mean something to Markdown, HTML or MathJax becomes an entity."""
    return re.sub(r"[^\w\s.,:;%+\-=/()'°]", lambda mark: f"&#{ord(mark.group())};", clean(text).replace("\n", " "))
