"""House rules over the notebooks: the order of cells, alternative text, no installs, executed in order, outputs present, small."""

import re
from pathlib import Path

import nbformat
import pytest

from labkit.exercises.exercise import all_exercises
from labkit.paths import NOTEBOOKS

ORDER = ["title", "abilities", "setup", "cold-open", "predict", "idea", "exercise", "check", "hints", "bridge",
         "figure", "claims", "play", "static-twin", "control", "question", "recap", "receipt"]
REPEATED = {"predict", "idea", "exercise", "check", "hints", "bridge"}
NEEDED = {"title", "abilities", "setup", "cold-open", "predict", "idea", "figure", "claims", "play", "static-twin", "control", "question", "recap"}
INSTALLS = re.compile(r"^\s*[!%].*\b(pip|conda|apt|wget|curl)\b|subprocess|urllib|requests\.|snapshot_download|hf_hub", re.MULTILINE)
LARGEST = 1_000_000
WIDEST = 112  # what JupyterLab shows without scrolling on a laptop


def role(cell):
    return next((tag for tag in cell.metadata.get("tags", []) if tag in ORDER), None)


def faults(path: Path):
    """Every rule that the notebook breaks, as sentences; empty where it keeps them all."""
    notebook = nbformat.read(path, as_version=4)
    found = [f"{path.stat().st_size:,} bytes, at most {LARGEST:,}"] if path.stat().st_size > LARGEST else []
    roles = [role(cell) for cell in notebook.cells]
    found += [f"cell {i} has no role among its tags" for i, r in enumerate(roles) if r is None]
    found += [f"no cell is a {name!r}" for name in sorted(NEEDED - set(roles))]
    found += order_faults([r for r in roles if r])
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells were not executed once, in order, in a fresh kernel")
    if not any(cell.outputs for cell in code):
        found.append("no outputs are stored")
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {i}: {fault}" for fault in code_faults(cell)]
        elif re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]+\")", cell.source):
            found.append(f"cell {i}: a picture without alternative text")
    graded = [cell for cell, r in zip(notebook.cells, roles) if r == "exercise" and cell.cell_type == "code" and "nbgrader" in cell.metadata]
    if graded and (roles[-1] != "receipt" or f'receipt("{path.name}")' not in notebook.cells[-1].source):
        found.append("the last cell does not print the receipt of this notebook")
    found += card_faults(notebook.cells, roles)
    setups = [cell for cell, r in zip(notebook.cells, roles) if r == "setup"]
    if len(setups) != 1 or len(setups[0].source.strip().splitlines()) > 8:
        found.append("there is not exactly one set-up cell of at most 8 lines")
    if not re.search(r"^Measured: \d", notebook.cells[0].source, re.MULTILINE):
        found.append("the title does not say what was measured; run `python3 -m labkit run --inplace`")
    return found


def card_faults(cells, roles):
    """Exercise cards, cells, checks and the exercise objects must say the same: number, minutes, points, names."""
    found, known, number = [], all_exercises(), 0
    for i, (cell, r) in enumerate(zip(cells, roles)):
        if r != "exercise" or cell.cell_type != "markdown":
            continue
        number += 1
        graded = cells[i + 1].metadata.get("nbgrader")
        if not graded:
            continue  # an exercise for its own sake
        exercise = known.get(graded["grade_id"])
        if exercise is None:
            found.append(f"cell {i + 1}: there is no exercise {graded['grade_id']}")
            continue
        card = rf"^\*\*Exercise {number} · {exercise.minutes} minutes · (easy|medium|hard) · {exercise.points} points\*\* \S"
        if not re.match(card, cell.source):
            found.append(f"cell {i}: the card does not say Exercise {number}, {exercise.minutes} minutes, {exercise.points} points")
        asks = cells[i + 2]
        if asks.source.strip() != f"check({exercise.entry})" or asks.metadata["nbgrader"]["points"] != exercise.points:
            found.append(f"cell {i + 2}: not the check of {exercise.id}, for {exercise.points} points")
    return found


def order_faults(roles):
    """The roles must come in ORDER, except that the block predict ... bridge may come again."""
    found, position = [], 0
    for name in roles:
        place = ORDER.index(name)
        if place < position and not (name in REPEATED and ORDER[position] in REPEATED):
            found.append(f"{name!r} comes after {ORDER[position]!r}")
        position = place
    return found


def code_faults(cell):
    found = []
    if INSTALLS.search(cell.source):
        found.append("installs or downloads something")
    if re.search(r"\bif testing\b|os\.environ|/work/|/home/|C:\\\\", cell.source):
        found.append("branches on where it runs, or names a folder of one machine")
    if max(map(len, cell.source.split("\n"))) > WIDEST:
        found.append(f"a line of more than {WIDEST} characters: it does not fit on the page")
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"stored error {output.ename}")
        data = output.get("data", {})
        if {"image/png", "image/jpeg", "image/svg+xml"} & set(data):
            found.append("a figure without alternative text: use plots.show(figure, alt=...)")
        if re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", data.get("text/html", "")):
            found.append("a picture whose alternative text is empty")
    return found


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_keeps_the_house_rules(path):
    assert faults(path) == []


def broken(notebook, fault):
    cards = [cell for cell in notebook.cells if cell.source.startswith("**Exercise")]
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if fault == "alternative text":
        code.outputs = [nbformat.v4.new_output("display_data", {"image/png": "AAAA"})]
    elif fault == "installs":
        code.source = "%pip install torch"
    elif fault == "executed":
        code.execution_count = 7
    elif fault == "role":
        notebook.cells[3].metadata["tags"] = []
    elif fault == "does not fit":
        code.source += "\nx = 0" + " + 1" * 50
    elif fault == "receipt":
        notebook.cells.pop()
    elif fault == "the card does not say":
        cards[-1].source = cards[-1].source.replace("minutes", "hours")
    elif fault == "not the check of":
        notebook.cells[notebook.cells.index(cards[0]) + 2].source = "check(print)"
    elif fault == "comes after":
        notebook.cells.append(notebook.cells.pop(0))
    elif fault == "stored error":
        code.outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]
    elif fault == "set-up cell":
        code.source = "\n".join("x = 1" for _ in range(9))
    elif fault == "bytes, at most":
        notebook.metadata["ballast"] = "x" * LARGEST
    return notebook


@pytest.mark.parametrize("fault", [
    "alternative text", "installs", "executed", "role", "comes after", "stored error", "set-up cell", "bytes, at most", "receipt", "does not fit",
    "the card does not say", "not the check of",
])
def test_each_house_rule_can_be_broken(fault, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "01_sft_loss_masking.ipynb", as_version=4)
    path = tmp_path / "broken.ipynb"
    nbformat.write(broken(notebook, fault), path)
    assert any(fault in sentence for sentence in faults(path))


def test_every_notebook_is_linked_from_the_readme():
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb")) if f"notebooks/{path.name}" not in readme] == []


def test_the_readme_lists_every_public_name():
    import labkit

    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in labkit.__all__ if not re.search(rf"\| `{name}\b", readme)] == []
