"""What is checked of a lab report without a person, a sentence for each thing that is not as it should be. What a person judges is in parts.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from labkit.errors import UserError
from labkit.lab_report.notebook import NOTEBOOK
from labkit.lab_report.page import PAGE
from labkit.lab_report.parts import PARTS, RECORDED
from labkit.lab_report.record import GENERIC, RECORD, digest_of_folder, of_run
from labkit.lab_report.tables import Table

FEWEST_EPISODES, FEWEST_CONDITIONS = 20, 2


def checked() -> Table:
    """What `unmet` and `unwritten` look at, for the reader of a report."""
    fewest, most = (end(part.words for part in PARTS.values()) for end in (min, max))
    return Table("Checked automatically, by python -m labkit report", (), [
        ("all parts", f"the numbers are recorded, and as many words are written as the part asks for ({fewest} to {most})"),
        ("dataset", "it validates without an error; where its folder is there, its files are those that were recorded"),
        ("fine-tuning", "where the run's folder is there, curves and settings are those that it holds"),
        ("comparison", f"at least {FEWEST_CONDITIONS} conditions, with at least {FEWEST_EPISODES} episodes in each"),
        ("integration", f"at least {FEWEST_EPISODES} episodes through the server"),
        ("notebook and page", f"their tables are those of {RECORD}, and the page has the notebook's words; pictures are not compared"),
    ])


def unmet(name: str, stored: dict | None) -> list[str]:
    """What a part's record does not say, or no longer truly says; all of it where there is none."""
    part = PARTS[name]
    found = [f"nothing is recorded, report.{part.call} does it"] if stored is None else _UNMET[name](stored)
    return [f"{part.title}: {text}" for text in found]


def _unmet_dataset(stored):
    folder = Path(stored["folder"])
    if stored["errors"]:
        yield f"validation finds {stored['errors']} errors; `python -m labkit validate {folder}` says what mends them"
    if folder.is_dir() and digest_of_folder(folder) != stored["digest"]:
        yield f"{folder} is not what was recorded: record it again"


def _unmet_training(stored):
    if not Path(stored["folder"]).is_dir():
        return
    try:
        run = of_run(stored["folder"])
    except UserError as error:
        yield str(error)
        return
    if run["curves"] != stored["curves"] or {**stored["settings"], **run["settings"]} != stored["settings"]:
        yield f"curves and settings are not those in {stored['folder']}: record the run again"


def _unmet_comparison(stored):
    few = [f"{where} ({len(row[GENERIC]['success'])})" for where, row in stored["rows"].items() if len(row[GENERIC]["success"]) < FEWEST_EPISODES]
    if few:
        yield f"fewer than {FEWEST_EPISODES} episodes in {', '.join(few)}: an interval of so few says nothing"
    if len(stored["rows"]) < FEWEST_CONDITIONS:
        yield "one condition only: robustness needs a second, robustness.under(policy, task, condition)"


def _unmet_integration(stored):
    if len(stored["served"]["success"]) < FEWEST_EPISODES:
        yield f"fewer than {FEWEST_EPISODES} episodes ({len(stored['served']['success'])}) ran through the server"


_UNMET = dict(zip(RECORDED, (_unmet_dataset, _unmet_training, _unmet_comparison, _unmet_integration), strict=True))


def unwritten(words: Mapping[str, Iterable[str]]) -> list[str]:
    """Which parts have fewer words of the student's than they ask for.   words: part -> texts."""
    counts = {name: len(re.findall(r"\w+", " ".join(words.get(name, ())))) for name in PARTS}
    return [f"{NOTEBOOK}, {part.title}: {counts[name]} of at least {part.words} words are written" for name, part in PARTS.items()
            if counts[name] < part.words]


def out_of_date(stale: Iterable[str], page_is_the_same: bool) -> list[str]:
    """Which cells of the notebook, and whether the page, say something else than the record."""
    titles = {name: part.title for name, part in PARTS.items()}
    found = [f"{NOTEBOOK}, {titles.get(name, name)}: its facts are not those of {RECORD}: report.build() puts them back" for name in stale]
    return found if page_is_the_same else [*found, f"{PAGE} does not say what {RECORD} and {NOTEBOOK} say: report.build() makes it again"]
