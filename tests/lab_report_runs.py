"""Runs to report on, made by hand, a report of them, and a reader of its page, for the tests of the lab report."""

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from html.parser import HTMLParser

import nbformat
import numpy as np
import torch

from labkit.lab_report import LabReport
from labkit.lab_report.parts import PARTS
from labkit.paths import DATA
from labkit.policy import Decision
from labkit.rollouts import Rollouts
from labkit.serving.client import PolicyClient
from labkit.serving.core import PolicyCore
from labkit.serving.http import PolicyServer
from labkit.waypoint_regression import STATE, Curves

SETTINGS = {"batch_size": 16, "head_rate": 1e-3, "loss": "l1"}


def runs(task, share, episodes=40, first=1_000_000, seed=0):
    rng = np.random.default_rng(seed)
    return Rollouts(task, rng.random(episodes) < share, np.arange(episodes) + first, rng.integers(1, 6, episodes), rng.random(episodes) / 20,
                    10 + rng.exponential(5, 20), 3.21)


def run_folder(folder, epochs=((0.4321, 0.5432), (0.3217, 0.3987), (0.2103, 0.4115)), settings=SETTINGS):
    """What `fit` leaves in a folder, as far as a report reads it.   epochs: (training loss, validation loss) of each."""
    curves = Curves(trainable=1234, total=56789, seconds=12.34)
    for train, validation in epochs:
        curves.rates.append({"head": 1e-3, "towers": 3e-4})
        curves.add(train, validation)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"curves": json.dumps(asdict(curves)), "settings": settings}, folder / STATE)
    return folder


def accuracy(of):
    return {axis: {"error": of * error, "unit": unit}
            for axis, error, unit in (("x", 0.0123, "m"), ("yaw", 0.1234, "rad"), ("grip", 0.0456, ""))}


def compared(report, **changes):
    """Record a comparison of made-up runs.   changes: of what the call is given."""
    given = {"generic": {"as trained": runs("align", 0.2), "camera": runs("align", 0.1, seed=1)},
             "fine_tuned": {"as trained": runs("align", 0.8, seed=2), "camera": runs("align", 0.5, seed=3)},
             "accuracy": (accuracy(3), accuracy(1)), "decisions": 44}
    report.comparison(**{**given, **changes})


class Still:
    """A policy that always says the same."""

    name = "still"

    def decide(self, observations):
        count = len(observations)
        return Decision(np.zeros((count, 4), int), np.zeros((count, 4)), np.zeros((count, 7)), np.full((count, 4), np.nan), 1e-3)


@contextmanager
def used_server():
    """One that has answered 25 requests, of which 3 were no good."""
    import urllib3

    with PolicyCore(Still()) as core, PolicyServer(core, port=0).in_background() as server:
        client = PolicyClient(server.url)
        for _ in range(22):
            client.decide([{"rgb": np.zeros((48, 48, 3), np.uint8), "instruction": "pick up the red block", "holding": 0}])
        client.close()
        with urllib3.PoolManager() as pool:
            sent = {"body": b"{}", "headers": {"Content-Type": "application/json"}}
            assert {pool.request("POST", server.url + "/act", **sent).status for _ in range(3)} == {422}
        while sum(sample.value for metric in server.registry.collect() for sample in metric.samples if sample.name.endswith("_total")) < 25:
            time.sleep(0.01)  # an answer is counted when it has been sent
        yield server


def whole_report(folder):
    """A report with all parts recorded and built."""
    report = LabReport(folder, author="Ada")
    report.dataset(DATA / "demonstrations" / "align")
    report.training(run_folder(folder / "run"), variant="last-layers", patience=None)
    compared(report)
    with used_server() as server:
        report.integration(server, served=runs("align", 0.8, seed=2), alone=runs("align", 0.8, seed=2))
    report.build()
    return report


def copy_of(report, folder):
    """The same report somewhere else."""
    return LabReport(shutil.copytree(report.folder, folder / "mine"))


def notebook_of(report):
    return nbformat.read(report.folder / "report.ipynb", as_version=4)


def save(report, notebook):
    nbformat.write(notebook, report.folder / "report.ipynb")


def gap(notebook, name):
    return next(cell for cell in notebook.cells if cell.metadata.get("labkit", {}).get("gap") == name)


def fill_gaps(report, text="Seventeen demonstrations were not enough for the wrist. "):
    notebook = notebook_of(report)
    for name, part in PARTS.items():
        gap(notebook, name).source = f"{name}. " + text * part.words
    save(report, notebook)


class Page(HTMLParser):
    """What a page holds: elements that are open and closed in order, and the text of its tables, pictures and the student's words."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells, self.alts, self.words, self.sections = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        self.tags.append((tag, attributes))
        if tag == "img":
            self.alts.append(attributes["alt"])
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag in ("td", "th", "h3"):
            self.cells.append("")
        if attributes.get("class") == "words":
            self.words.append("")
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if set(inside) & {"td", "th", "h3"}:
            self.cells[-1] += data
        if ("div", "words") in self.open:
            self.words[-1] += data


def page_of(report):
    return Page((report.folder / "report.html").read_text(encoding="utf-8"))
