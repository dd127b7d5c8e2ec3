"""A student's lab report: recorded call by call, built as a notebook and a page, and checked. The steps themselves are in the modules beside."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from labkit.errors import UserError
from labkit.lab_report import checks, record
from labkit.lab_report.notebook import NOTEBOOK, facts_of, read_notebook, stale, with_facts, words_of, write_notebook
from labkit.lab_report.page import PAGE, page_of, without_pictures
from labkit.lab_report.parts import PARTS, RECORDED
from labkit.lab_report.record import RECORD
from labkit.lab_report.tables import SHOW, rubric
from labkit.rollouts import Rollouts


class LabReport:
    """One student's report in a folder: report.json (the record), report.ipynb (where the student writes) and report.html (to hand in).

    Each part is recorded by one call, and recorded anew by another one; what the student has written is never touched.
    """

    def __init__(self, folder, author: str = ""):
        """folder: made when something is recorded; one with a record is gone on with, and keeps its author where none is given.

        Raises UserError where the record there cannot be read.
        """
        self.folder = Path(folder)
        self.stored = record.read_record(self.folder / RECORD)
        self.stored["author"] = author or self.stored["author"]

    def dataset(self, folder) -> None:
        """Record what a dataset holds, ours or LeRobot's, and what its validation finds.   Raises UserError where there is none."""
        self._record("dataset", record.of_dataset(folder))

    def training(self, folder, **others) -> None:
        """Record a run from the folder that `waypoint_regression.fit(..., folder=...)` kept it in: its settings and curves.

        others: settings that the folder does not know, such as variant="lora"; numbers, texts or None.
        Raises UserError where no run is there or `others` contradicts it.
        """
        self._record("training", record.of_training(folder, others))

    def comparison(self, generic: Mapping[str, Rollouts], fine_tuned: Mapping[str, Rollouts], accuracy: tuple[Mapping, Mapping],
                   decisions: int) -> None:
        """Record two policies on the same episodes.

        generic, fine_tuned: where -> Rollouts, with the same keys; a condition or a task each.
        accuracy: what `waypoint_regression.action_accuracy` gives for the two.   decisions: how many it was measured on.
        Raises UserError where the two have other keys, tasks, episodes or axes, or rollouts without response times.
        """
        self._record("comparison", record.of_comparison(generic, fine_tuned, accuracy, decisions))

    def integration(self, server, served: Rollouts, alone: Rollouts) -> None:
        """Record a policy server's work.   server: `serving.http.PolicyServer`, after the robot has used it.

        served: closed loop through it, `rollout(PolicyClient(server.url), ..., batch=1)`, as one robot asks.
        alone: the same policy on the same episodes, asked directly.
        Raises UserError where the episodes differ or the server has decided nothing.
        """
        self._record("integration", record.of_integration(server, served, alone))

    def build(self) -> tuple[Path, Path]:
        """Write page and notebook from the record and from what the student has written; returns their paths.

        Every cell that the student wrote stays. The page has the Markdown ones, as plain text.
        Raises UserError where the record or the notebook cannot be read: nothing is written then.
        """
        shown = self._shown()
        notebook = with_facts(read_notebook(self.folder / NOTEBOOK), facts_of(self.stored["author"], shown))
        page = page_of(self.stored["author"], shown, words_of(notebook))
        write_notebook(self.folder / NOTEBOOK, notebook)
        record.replace_text(self.folder / PAGE, page)
        return self.folder / PAGE, self.folder / NOTEBOOK

    def check(self) -> list[str]:
        """What is not as it should be, a sentence each; an empty list where only a person's judgement is left.

        What is looked at, and the rubric of the person, stand at the end of the page.   Raises UserError as `build` does.
        """
        notebook, shown, found = read_notebook(self.folder / NOTEBOOK), self._shown(), []
        for name in RECORDED:
            with self._reading(name):
                found += checks.unmet(name, self.stored.get(name))
        missing = [name for name in (NOTEBOOK, PAGE) if not (self.folder / name).is_file()]
        if missing:
            return [*found, f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not there yet: report.build() makes it"]
        words, page = words_of(notebook), (self.folder / PAGE).read_text(encoding="utf-8", errors="replace")
        is_the_same = without_pictures(page) == without_pictures(page_of(self.stored["author"], shown, words))
        return [*found, *checks.unwritten(words), *checks.out_of_date(stale(notebook, facts_of(self.stored["author"], shown)), is_the_same)]

    def _record(self, name, facts):
        stored = {**self.stored, name: facts}
        record.write_record(self.folder / RECORD, stored)
        self.stored = stored

    def _shown(self):
        """Part -> tables and pictures, without parts that are not recorded; "marking" is the end."""
        shown = {"marking": [checks.checked(), *rubric()]}
        for name in RECORDED:
            if name in self.stored:
                with self._reading(name):
                    shown[name] = SHOW[name](self.stored[name])
        return shown

    @contextmanager
    def _reading(self, name):
        """Raises UserError where the record has a part that cannot be read."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise UserError(f"{self.folder / RECORD}, part {name!r} is not as LabReport writes it ({error!r}): record it again, "
                            f"report.{PARTS[name].call}") from error
