"""data/claims.json against the notebooks: every claim that a lesson's table treats is listed, with the cell that computes it and what came out."""

import json
import re
from collections import Counter

import nbformat
import pytest

from labkit.claims import CLAIMS
from labkit.paths import DATA, ROOT

NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
LISTED = json.loads((DATA / "claims.json").read_text(encoding="utf-8"))
FIELDS = {"id", "notebook", "cell", "value", "verdict", "recomputed"}
VERDICTS = {"exact", "holds", "loose", "off", "refuted", "depends", "not seen at this scale"}


def printed(cell):
    """What a cell's stored outputs say, in one line."""
    texts = [output.get("text") or output.get("data", {}).get("text/markdown") or output.get("data", {}).get("text/plain", "")
             for output in cell.outputs]
    return " ".join(" ".join(texts).split())


def table_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and "claims_table(" in cell.source]


def treated(notebook):
    """The ids of the claims in a lesson's tables."""
    return [key for cell in table_cells(notebook) for key in CLAIMS if re.search(rf'"{re.escape(key)}"\s*:', cell.source)]


def disagreement(entry, notebooks):
    """Why an entry of data/claims.json and its notebook do not agree, in one sentence; empty where they do."""
    if set(entry) != FIELDS:
        return f"its fields are {', '.join(sorted(entry))}"
    if entry["verdict"] not in VERDICTS:
        return f"{entry['verdict']!r} is no verdict"
    notebook = notebooks.get(entry["notebook"])
    if notebook is None:
        return f"there is no notebook {entry['notebook']}"
    if entry["id"] not in treated(notebook):
        return "the notebook's table does not treat it"
    cell = next((cell for cell in notebook.cells if cell.id == entry["cell"] and cell.cell_type == "code"), None)
    if cell is None:
        return f"there is no code cell {entry['cell']}"
    if entry["value"] not in printed(cell):
        return f"cell {entry['cell']} does not print {entry['value']!r}"
    if entry["recomputed"] != ("nbval-check-output" in cell.metadata.get("tags", [])):
        return f"cell {entry['cell']} is {'not ' * entry['recomputed']}compared by nbval (tag nbval-check-output)"
    return ""


@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: f"{entry['notebook'][:2]}-{entry['id']}")
def test_the_cell_of_a_claim_still_says_its_value(entry):
    assert disagreement(entry, NOTEBOOKS) == ""


def test_every_claim_that_a_table_treats_is_listed_once_for_its_notebook():
    in_tables = Counter((stem, key) for stem, notebook in NOTEBOOKS.items() for key in treated(notebook))
    assert Counter((entry["notebook"], entry["id"]) for entry in LISTED) == in_tables
    assert set(in_tables.values()) == {1}


def test_every_row_of_a_table_was_found():
    for stem, notebook in NOTEBOOKS.items():
        for cell in table_cells(notebook):
            (table,) = [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
            assert len(table.splitlines()) - 2 == sum(CLAIMS[key].says in table for key in treated(notebook)), stem


def test_every_claim_is_treated_somewhere():
    assert set(CLAIMS) == {entry["id"] for entry in LISTED}


@pytest.mark.parametrize("change, said", [
    ({"verdict": "nice"}, "no verdict"), ({"notebook": "99_none"}, "no notebook"), ({"cell": "none-1"}, "no code cell"),
    ({"value": "12345.6"}, "does not print"), ({"id": "bins"}, "does not treat"), ({"note": "x"}, "fields"), ({"recomputed": False}, "compared"),
])
def test_a_claim_that_no_longer_agrees_is_noticed(change, said):
    entry = next(entry for entry in LISTED if entry["id"] == "lora-matrix")
    assert disagreement(entry, NOTEBOOKS) == ""
    assert said in disagreement({**entry, **change}, NOTEBOOKS)


def test_a_cell_whose_output_changed_is_noticed():
    entry = next(entry for entry in LISTED if entry["id"] == "lora-matrix")
    changed = nbformat.from_dict(json.loads(json.dumps(NOTEBOOKS[entry["notebook"]])))
    cell = next(cell for cell in changed.cells if cell.id == entry["cell"])
    for output in cell.outputs:
        output["text"] = output.get("text", "").replace("131,072", "131,073")
    assert "does not print" in disagreement(entry, {entry["notebook"]: changed})
