"""Metadata: change what the notebook says about itself, and cells that nobody asked for."""

from tests.attacks.attack import LOST, POINTS, WRONG, Attack, code_cell, grade_id

_PATCH = "from labkit.exercises import judging\njudging.difference = lambda *values, **more: ''\n"
_ANOTHER_CHECK = "check = lambda entry: {'LoRALinear': 5, 'rank_needed': 4}.get(entry.__name__, 3)\n"


def _cell(notebook, id):
    return next(cell for cell in notebook["cells"] if grade_id(cell) == id)


def _points_in_metadata(notebook):
    for cell in notebook["cells"]:
        if grade_id(cell):
            cell["metadata"]["nbgrader"]["points"] = 1000


def _check_that_checks_nothing(notebook):
    _cell(notebook, "lora-count-check")["source"] = "pass"


def _no_check(notebook):
    _cell(notebook, "lora-count-check")["source"] = ""
    _cell(notebook, "lora-count-check")["metadata"]["nbgrader"]["points"] = 15


def _cells_in_front(notebook):
    place = notebook["cells"].index(_cell(notebook, "lora-count"))
    notebook["cells"].insert(place, code_cell(_PATCH))


def _another_set_up(notebook):
    place = notebook["cells"].index(_cell(notebook, "lora-count"))
    notebook["cells"].insert(place, code_cell(_PATCH, tags=["setup"]))


def _redefined_at_the_end(notebook):
    place = notebook["cells"].index(_cell(notebook, "lora-count-check"))
    notebook["cells"].insert(place, code_cell(_ANOTHER_CHECK))


def _twice(notebook):
    place = notebook["cells"].index(_cell(notebook, "lora-count"))
    copy = _cell(notebook, "lora-count")
    notebook["cells"].insert(place, {**copy, "source": _PATCH})


def _renamed(notebook):
    """The check of the easiest exercise under the name of the others'."""
    easy = _cell(notebook, "lora-count-check")
    for id in ("lora-merge-check", "lora-layer-check"):
        _cell(notebook, id)["source"] = easy["source"]


def _nonsense(notebook):
    notebook["cells"][:0] = [
        {"cell_type": "code", "source": ["x = 1"], "outputs": [], "metadata": {"nbgrader": ["lora-count"], "tags": "setup"}},
        {"cell_type": "code", "source": "x = 1", "outputs": 3, "metadata": {"nbgrader": {"grade_id": {"lora-count": 1}}, "tags": [["setup"], None]}},
        {"cell_type": ["code"], "source": None, "metadata": None}, {},
    ]  # fmt: skip


ATTACKS = [
    Attack("points-in-the-metadata", POINTS, "says in the metadata that an answer gives 1,000 points", change=_points_in_metadata),
    Attack("check-that-checks-nothing", POINTS, "empties the cell that checks", {"lora-count": WRONG["lora-count"]},
           change=_check_that_checks_nothing),
    Attack("empty-check-for-all-points", POINTS, "empties the cell that checks, and has it count for the whole notebook",
           {"lora-count": WRONG["lora-count"]}, change=_no_check),
    Attack("cell-in-front", POINTS, "adds a cell that patches the check", {"lora-count": WRONG["lora-count"]}, change=_cells_in_front),
    Attack("another-set-up-cell", POINTS, "adds a cell that patches the check, and tags it as set-up", {"lora-count": WRONG["lora-count"]},
           change=_another_set_up),
    Attack("cell-that-redefines", POINTS, "adds a cell that gives a name of the check another meaning", {"lora-count": WRONG["lora-count"]},
           change=_redefined_at_the_end),
    Attack("cell-twice", POINTS, "hands in two cells with one name, one of which patches", {"lora-count": WRONG["lora-count"]},
           change=_twice),
    Attack("renamed-checks", POINTS, "puts the check that it passes under the names of those that it does not",
           {"lora-merge": WRONG["lora-merge"], "lora-layer": WRONG["lora-layer"]}, change=_renamed),
    Attack("set-up-that-patches", POINTS, "patches in the set-up cell, and solves nothing", {"lora-count": WRONG["lora-count"]}, setup=_PATCH),
    Attack("set-up-with-another-check", POINTS, "gives the check's name another meaning in the set-up cell",
           {"lora-count": WRONG["lora-count"]}, setup=_ANOTHER_CHECK),
    Attack("metadata-that-is-none", LOST, "puts lists where names are due, and nothing where a cell is due", change=_nonsense),
    Attack("exercise-as-set-up", POINTS, "tags the exercise's cell as set-up, where other rules hold", {"lora-count": _PATCH + WRONG["lora-count"]},
           change=lambda notebook: _cell(notebook, "lora-count")["metadata"].update(tags=["setup", "exercise"])),
]
