"""Properties of the lab report: every number comes from the record, no word of the student's is lost, and what is missing is named."""

import base64
import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from itertools import chain

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from labkit.__main__ import parse, read_commands
from labkit.clip_pretraining import Recipe, build_model, build_processor
from labkit.demonstrations import read
from labkit.errors import UserError
from labkit.lab_report import FEWEST_EPISODES, GAP, PARTS, RECORD, RECORDED, LabReport, rubric
from labkit.paths import DATA, ROOT
from labkit.policy import Decision
from labkit.rollouts import Rollouts
from labkit.serving.core import PolicyCore
from labkit.serving.http import PolicyServer
from labkit.task_specific_vla import policy_from_towers, set_trainable
from labkit.waypoint_regression import STATE, Curves, fit, waypoint_samples

SETTINGS = {"epochs": 3, "batch_size": 16, "head_rate": 1e-3, "loss": "l1", "patience": None}
HOSTILE = '<script>alert("1")</script> ]] | `x` $\\frac{1}$ { {{ 7 * 7 }} {% raw %} ![a](b) \u202e "quoted" \'single\' & <img src=x onerror=y>'
LEROBOT = ROOT / "tests" / "lerobot_fixture"


def runs(task, share, episodes=40, first=1_000_000, seed=0):
    rng = np.random.default_rng(seed)
    return Rollouts(task, rng.random(episodes) < share, np.arange(episodes) + first, rng.integers(1, 6, episodes), rng.random(episodes) / 20,
                    10 + rng.exponential(5, 20), 3.21)


def curves():
    made = Curves(trainable=1234, total=56789, seconds=12.34)
    for train, validation in ((0.4321, 0.5432), (0.3217, 0.3987), (0.2103, 0.4115)):
        made.rates.append({"head": 1e-3, "towers": 3e-4})
        made.add(train, validation)
    return made


def accuracy(of):
    return {axis: {"error": of * error, "unit": unit}
            for axis, error, unit in (("x", 0.0123, "m"), ("yaw", 0.1234, "rad"), ("grip", 0.0456, ""))}


class Still:
    """A policy that always says the same."""

    name = "still"

    def decide(self, observations):
        count = len(observations)
        return Decision(np.zeros((count, 4), int), np.zeros((count, 4)), np.zeros((count, 7)), np.full((count, 4), np.nan), 1e-3)


@pytest.fixture(scope="module")
def server():
    """One that has answered 25 requests, of which 3 were no good."""
    import urllib3

    from labkit.serving.client import PolicyClient

    with PolicyCore(Still()) as core, PolicyServer(core, port=0).in_background() as server:
        client = PolicyClient(server.url)
        for _ in range(22):
            client.decide([{"rgb": np.zeros((48, 48, 3), np.uint8), "instruction": "pick up the red block", "holding": 0}])
        client.close()
        with urllib3.PoolManager() as pool:
            sent = {"body": b"{}", "headers": {"Content-Type": "application/json"}}
            assert {pool.request("POST", server.url + "/act", **sent).status for _ in range(3)} == {422}
        yield server


@pytest.fixture(scope="module")
def recorded(server, tmp_path_factory):
    """A folder with all sections recorded and built."""
    folder = tmp_path_factory.mktemp("recorded")
    report = LabReport(folder, author="Ada")
    report.dataset(DATA / "demonstrations" / "align")
    report.training(curves(), SETTINGS)
    generic = {"as trained": runs("align", 0.2), "camera": runs("align", 0.1, seed=1)}
    tuned = {"as trained": runs("align", 0.8, seed=2), "camera": runs("align", 0.5, seed=3)}
    report.comparison(generic, tuned, (accuracy(3), accuracy(1)), decisions=44)
    report.integration(server, served=runs("align", 0.8, seed=2), alone=runs("align", 0.8, seed=2))
    report.build()
    return folder


@pytest.fixture
def report(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "mine")
    return LabReport(tmp_path / "mine")


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
    """What a page holds: elements that are open and closed in order, and the text of its table cells and pictures."""

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
        if tag in ("td", "th", "caption"):
            self.cells.append("")
        if attributes.get("class") == "words":
            self.words.append("")
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if set(inside) & {"td", "th", "caption"}:
            self.cells[-1] += data
        if ("div", "words") in self.open:
            self.words[-1] += data


def page_of(report):
    return Page((report.folder / "report.html").read_text(encoding="utf-8"))


# --- the page and the notebook ------------------------------------------------------------------------------------------------

def test_the_page_has_every_section_in_the_sheet_s_order_and_needs_nothing_else(report):
    page = page_of(report)
    assert page.sections == list(PARTS)
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "form")] == []
    sources = [attributes["src"] for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert all(len(alt) > 40 for alt in page.alts)


def test_the_notebook_is_valid_shows_the_same_tables_and_has_one_gap_a_part(report):
    notebook = notebook_of(report)
    nbformat.validate(notebook)
    assert [cell.metadata.labkit.gap for cell in notebook.cells if "gap" in cell.metadata.labkit] == list(PARTS)
    text = "\n".join(cell.source for cell in notebook.cells)
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.strip("|").split("|")]
    on_page = [cell.strip() for cell in page_of(report).cells if cell.strip()]
    assert [cell for cell in on_page if cell not in cells and f"**{cell}**" not in text] == []
    assert [name for cell in notebook.cells for name in cell.get("attachments", {})] == ["curves.png", "success.png"]


def derived(stored):
    """Every number that may stand in a report: what is stored, and scipy's and numpy's summaries of it."""
    found = []

    def leaves(value):
        if isinstance(value, dict):
            for item in value.values():
                leaves(item)
        elif isinstance(value, list):
            # Of single episodes and times a report shows summaries only.
            found.append(len(value))
            if len(value) < 20:
                for item in value:
                    leaves(item)
        elif isinstance(value, (int, float)):
            found.append(value)
        elif isinstance(value, str):
            found.extend(map(float, re.findall(r"\d+(?:\.\d+)?", value)))

    leaves(stored)
    rows = list(stored["comparison"]["rows"].values())
    single = [run for row in rows for run in row.values()] + [stored["integration"][name] for name in ("alone", "served")]
    for run in single:
        good, count = sum(run["success"]), len(run["success"])
        interval = binomtest(good, count).proportion_ci(method="wilson")
        found += [good / count, interval.low, interval.high, *np.percentile(run["milliseconds"], [50, 95])]
    for n in ("generic", "fine-tuned"):
        times = list(chain(*(row[n]["milliseconds"] for row in rows)))
        found += [len(times), *np.percentile(times, [50, 95])]
    for row in rows:
        a, b = (np.array(row[n]["success"], bool) for n in ("generic", "fine-tuned"))
        found += [b.mean() - a.mean(), binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue, *newcombe(a, b)]
    found += [sum(split[key] for split in stored["dataset"]["splits"].values()) for key in ("episodes", "successes", "decisions")]
    found += [count for count in (sum(n for s, n in stored["integration"]["answers"].items() if s[0] == d) for d in "245")]
    found += [stored["integration"]["misses"] / stored["integration"]["decisions"], 95]
    degrees = [np.degrees(kept["error"]) for n in ("generic", "fine-tuned") for kept in stored["comparison"]["accuracy"][n].values()]
    return np.array([*found, *degrees])


def newcombe(a, b):
    """The interval by his method 10, written down from the paper (Statistics in Medicine 17, 1998, 2635-2650)."""
    n, (p, q) = len(a), (b.mean(), a.mean())
    e, f, g, h = (b & a).sum(), (b & ~a).sum(), (~b & a).sum(), (~b & ~a).sum()
    ends = [binomtest(int(x.sum()), n).proportion_ci(method="wilson") for x in (b, a)]
    product = (e + f) * (g + h) * (e + g) * (f + h)
    top = e * h - f * g
    phi = (max(top - n / 2, 0) if top > 0 else top) / np.sqrt(product) if product else 0
    lower = np.sqrt((p - ends[0].low) ** 2 - 2 * phi * (p - ends[0].low) * (ends[1].high - q) + (ends[1].high - q) ** 2)
    upper = np.sqrt((q - ends[1].low) ** 2 - 2 * phi * (q - ends[1].low) * (ends[0].high - p) + (ends[0].high - p) ** 2)
    return p - q - lower, p - q + upper


def strangers(texts, known):
    """Numbers in the texts that are no known one, as it is, in percent or in thousandths, to their own last digit."""
    found = []
    for text in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", " ".join(texts)):
        number, (mantissa, _, exponent) = float(text.replace(",", "")), text.partition("e")
        half = 0.5001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if not any((np.abs(scale * known - number) <= half).any() for scale in (1, 100, 1000)):
            found.append(text)
    return found


def test_every_number_that_is_shown_was_stored_or_follows_from_what_was(report):
    page, known = page_of(report), derived(json.loads((report.folder / RECORD).read_text()))
    assert strangers([*page.cells, *page.alts], known) == []
    # The comparison tells: of the same numbers, each with another digit at its end, hardly one is known.
    precise = re.findall(r"\d[\d,]*\.\d+|\d[\d,]*\d\d\b", " ".join([*page.cells, *page.alts]))
    others = [text[:-1] + str((int(text[-1]) + 3) % 10) for text in precise]
    assert len(others) > 60 and len(strangers(others, known)) > 0.75 * len(others)


def test_what_the_sections_say_is_what_was_measured(report):
    text = " | ".join(page_of(report).cells)
    for said in ("50 | 50 | 100", "0 errors, 0 warnings", "0.4321 and 0.2103", "0.3987 in epoch 1", "1,234 of 56,789", "36.90 mm | 12.30 mm",
                 "7.07 degrees", "13.68 % | 4.56 %", "on 44 decisions", "answered | 22", "refused (4xx) | 3", "failed (5xx) | 0", "decisions | 22"):
        assert said in text, said


def test_a_lerobot_dataset_is_described_too(tmp_path):
    about, report = json.loads((LEROBOT / "meta" / "info.json").read_text()), LabReport(tmp_path)
    report.dataset(LEROBOT)
    splits = report.stored["dataset"]["splits"].values()
    assert sum(split["episodes"] for split in splits) == about["total_episodes"]
    assert sum(split["decisions"] for split in splits) == about["total_frames"]


# --- what the student has written ----------------------------------------------------------------------------------------------

def test_words_survive_every_way_of_recording_and_building_anew(report):
    fill_gaps(report)
    before = {name: gap(notebook_of(report), name).source for name in PARTS}
    report.build()
    report.training(curves(), {**SETTINGS, "epochs": 99})
    LabReport(report.folder).build()
    assert {name: gap(notebook_of(report), name).source for name in PARTS} == before
    assert page_of(report).words == [text.strip() for text in before.values()]
    assert "| epochs | 99 |" in "\n".join(cell.source for cell in notebook_of(report).cells)


def test_cells_that_were_added_split_moved_or_changed_are_kept(report):
    notebook = notebook_of(report)
    first, last = gap(notebook, "dataset"), gap(notebook, "improvements")
    first.source = "the first half"
    half = nbformat.v4.new_markdown_cell("the second half", metadata=dict(first.metadata))
    notebook.cells.insert(notebook.cells.index(first) + 1, half)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("a motto"))
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text="2")]))
    facts = next(cell for cell in notebook.cells if cell.metadata.get("labkit", {}).get("part") == "training")
    facts.source = facts.source + "\n\na remark between the tables"
    notebook.cells.remove(last)
    last.source = "moved to the top"
    notebook.cells.insert(0, last)
    save(report, notebook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nbformat mends ids that two cells share, at random, and says so
        for _ in range(3):
            report.build()
    rebuilt = notebook_of(report)
    nbformat.validate(rebuilt)
    texts = [cell.source for cell in rebuilt.cells]
    for text in ("the first half", "the second half", "a motto", "1 + 1", "moved to the top"):
        assert texts.count(text) == 1, text
    assert sum("a remark between the tables" in text for text in texts) == 1
    assert next(cell for cell in rebuilt.cells if cell.source == "1 + 1").outputs[0].text == "2"
    assert texts.index("the second half") == texts.index("the first half") + 1
    assert texts.index("moved to the top") > texts.index("the first half")
    assert len({cell.id for cell in rebuilt.cells}) == len(rebuilt.cells)
    said = " ".join(page_of(report).words)
    assert all(text in said for text in ("a motto", "the first half", "the second half", "a remark between", "moved to the top"))


def test_a_gap_that_was_deleted_comes_back_empty(report):
    notebook = notebook_of(report)
    notebook.cells.remove(gap(notebook, "challenges"))
    save(report, notebook)
    report.build()
    assert gap(notebook_of(report), "challenges").source == GAP


@pytest.mark.parametrize("content", ["", "{", '{"cells": 3}', '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "x"}]}'])
def test_a_notebook_that_cannot_be_read_is_not_written_over(report, content):
    path, page = report.folder / "report.ipynb", (report.folder / "report.html").read_bytes()
    path.write_text(content)
    with pytest.raises(UserError, match="report.ipynb is no readable notebook .*move it away"):
        report.build()
    assert path.read_text() == content and (report.folder / "report.html").read_bytes() == page


def test_building_twice_changes_nothing(report):
    fill_gaps(report)
    report.build()
    before = [(report.folder / name).read_bytes() for name in ("report.html", "report.ipynb", RECORD)]
    report.build()
    assert [(report.folder / name).read_bytes() for name in ("report.html", "report.ipynb", RECORD)] == before


# --- hostile text ---------------------------------------------------------------------------------------------------------------

def test_hostile_text_is_shown_and_nowhere_obeyed(tmp_path):
    clean = HOSTILE.replace("\u202e", " ")
    report = LabReport(tmp_path, author=HOSTILE)
    report.training(curves(), {HOSTILE: HOSTILE})
    report.comparison({HOSTILE: runs("align", 0.2)}, {HOSTILE: runs("align", 0.8)}, ({HOSTILE: {"error": 0.5, "unit": HOSTILE}},) * 2, decisions=3)
    report.build()
    fill_gaps(report, HOSTILE)
    report.build()
    page = page_of(report)
    assert {tag for tag, _ in page.tags} <= {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "bdi", "section", "div",
                                             "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "img"}
    assert page.cells.count(clean) == 4 and clean in page.words[0] and clean in page.alts[1]
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    notebook = notebook_of(report)
    ours = "\n".join(cell.source for cell in notebook.cells if "part" in cell.metadata.labkit)
    assert not re.search(r"[<>$\\\u202e]|\]\(b\)", ours)
    tables = re.findall(r"(?:^\| .*\n?)+", ours, re.MULTILINE)
    assert len(tables) == 5 and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_a_made_up_record_cannot_put_markup_into_the_page(report):
    path = report.folder / RECORD
    stored = json.loads(path.read_text())
    stored["integration"]["policy"] = stored["title"] = "<script>x</script>"
    stored["dataset"]["splits"] = {"<b>": {"episodes": 1, "successes": 1, "decisions": 1}}
    path.write_text(json.dumps(stored))
    LabReport(report.folder).build()
    assert not {"script", "b"} & {tag for tag, _ in page_of(report).tags}


@pytest.mark.parametrize("change, said", [
    (lambda stored: stored["training"]["curves"].pop("train"), "section 'training'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=["x"] * 40), "section 'comparison'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=[1]), "section 'comparison'"),
    (lambda stored: stored.update(dataset=[]), "section 'dataset'"),
    (lambda stored: stored["integration"].update(decisions="<b>"), "section 'integration'"),
    (lambda stored: stored.update(format="another"), "no record of a lab report"),
])
def test_a_record_that_was_spoilt_is_named_with_its_section(report, change, said):
    path = report.folder / RECORD
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    for act in (LabReport.build, LabReport.check):
        with pytest.raises(UserError) as error:
            act(LabReport(report.folder))
        assert said in str(error.value) and RECORD in str(error.value) and "record" in str(error.value)


# --- checking ---------------------------------------------------------------------------------------------------------------------

def test_a_finished_report_has_nothing_left_to_check_but_for_a_person(report):
    fill_gaps(report)
    assert [text for text in report.check() if "does not say what" in text] != []
    report.build()
    assert report.check() == []
    said = rubric()
    assert all(part.title in said for part in PARTS.values()) and all(criterion in said for part in PARTS.values() for _, criterion in part.rubric)
    assert f"{sum(part.points for part in PARTS.values())} points" in said


@pytest.mark.parametrize("name", RECORDED)
def test_a_missing_section_is_named_in_one_sentence_with_the_call_that_records_it(report, name):
    fill_gaps(report)
    del report.stored[name]
    report.build()
    assert re.fullmatch(r"1 section is missing: .*\.", report.missing()) and f"report.{PARTS[name].call}" in report.missing()
    (found,) = report.check()
    assert found.startswith(PARTS[name].title) and PARTS[name].call in found and "\n" not in found
    assert f"Not recorded: report.{PARTS[name].call} does it." in (report.folder / "report.html").read_text()


def test_an_empty_report_names_all_sections_in_one_sentence_and_builds(tmp_path):
    report = LabReport(tmp_path)
    assert report.missing().startswith("4 sections are missing: dataset (") and all(PARTS[name].call in report.missing() for name in RECORDED)
    report.build()
    assert page_of(report).sections == list(PARTS) and page_of(report).words == []


def test_gaps_are_counted_in_words_and_the_mark_counts_for_none(report):
    fill_gaps(report)
    notebook = notebook_of(report)
    gap(notebook, "dataset").source = GAP + " " + "word " * (PARTS["dataset"].words - 1)
    save(report, notebook)
    report.build()
    assert report.check() == [f"report.ipynb, {PARTS['dataset'].title}: {PARTS['dataset'].words - 1} of at least {PARTS['dataset'].words} words "
                              f"are written"]


def test_a_number_that_was_changed_in_the_notebook_or_on_the_page_is_noticed(report):
    fill_gaps(report)
    report.build()
    page = report.folder / "report.html"
    page.write_text(page.read_text().replace("36.90 mm", "6.90 mm"))
    assert report.check() == ["report.html does not say what report.json and report.ipynb say: report.build() makes it again"]
    report.build()
    notebook = notebook_of(report)
    for cell in notebook.cells:
        cell.source = cell.source.replace("36.90 mm", "6.90 mm")
    save(report, notebook)
    assert any(PARTS["comparison"].title in text and "are not those of report.json" in text for text in report.check())


def test_a_dataset_that_is_another_one_by_now_is_noticed(report, tmp_path):
    shutil.copytree(DATA / "demonstrations" / "align", tmp_path / "align")
    report.dataset(tmp_path / "align")
    assert not any(text.startswith(PARTS["dataset"].title) for text in report.check())
    path = tmp_path / "align" / "train" / "language_commands.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    assert any("is not what was recorded" in text for text in report.check())
    path.write_text("{")
    assert any("is not what was recorded" in text for text in report.check())


def test_a_dataset_with_errors_is_recorded_with_them(report, tmp_path):
    shutil.copytree(DATA / "demonstrations" / "align", tmp_path / "align")
    next((tmp_path / "align" / "train" / "images").iterdir()).unlink()
    report.dataset(tmp_path / "align")
    report.build()
    assert any("is missing" in cell for cell in page_of(report).cells)
    assert any(text.startswith(PARTS["dataset"].title) and "1 errors" in text for text in report.check())


def test_curves_that_are_not_those_of_the_run_are_noticed(report, tmp_path):
    made = curves()
    torch.save({"curves": json.dumps(vars(made)), "settings": {"head_rate": 1e-3}}, tmp_path / STATE)

    def found():
        return [text for text in report.check() if text.startswith(PARTS["training"].title)]

    report.training(made, SETTINGS, folder=tmp_path)
    assert found() == []
    report.training(made, {**SETTINGS, "head_rate": 0.5}, folder=tmp_path)
    assert len(found()) == 1 and "head_rate is not what" in found()[0]
    made.validation[1] /= 2
    report.training(made, SETTINGS, folder=tmp_path)
    assert len(found()) == 1 and "the curves are not those" in found()[0]
    (tmp_path / STATE).write_bytes(b"broken")
    assert len(found()) == 1 and "cannot be read" in found()[0]


def test_the_folder_of_a_real_run_agrees_with_its_curves(report, tmp_path):
    clip = build_model(Recipe(width=32, vision_layers=1, text_layers=1, seed=4))
    policy = policy_from_towers(clip.vision_model, clip.text_model, build_processor())
    set_trainable(policy.model, "frozen")
    samples = waypoint_samples(read(DATA / "demonstrations" / "align", "train", limit=4))
    made = fit(policy, samples, samples, folder=tmp_path / "run", epochs=2, batch_size=8, progress=False)
    report.training(made, {"epochs": 2, "batch_size": 8}, folder=tmp_path / "run")
    report.build()
    assert not any(text.startswith(PARTS["training"].title) and "words" not in text for text in report.check())
    report.stored["training"]["curves"]["train"][0] += 0.1
    assert any(text.startswith(PARTS["training"].title) and "the curves are not those" in text for text in report.check())


def test_a_comparison_that_proves_little_is_named(report, server):
    few = FEWEST_EPISODES - 1
    silent = Rollouts(**{**vars(runs("align", 0.5, few)), "milliseconds": np.array([])})
    report.comparison(silent, silent)
    report.integration(server, served=silent, alone=silent)
    said = "\n".join(report.check())
    for words in (f"fewer than {FEWEST_EPISODES} episodes in align ({few})", "one condition only", "action accuracy is missing",
                  "comparison: response times are missing", "integration results: response times are missing", f"episodes ({few}) ran through"):
        assert words.lower() in said.lower(), words


# --- what cannot be recorded ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("record, said", [
    (lambda r: r.comparison(runs("align", 0.5), runs("align", 0.5, first=5)), "align: only the same episodes can be paired"),
    (lambda r: r.comparison({"a": runs("align", 0.5)}, {"b": runs("align", 0.5)}), "the generic policy ran a, the fine-tuned one b"),
    (lambda r: r.comparison(runs("align", 0.5), runs("align", 0.5), (accuracy(1), accuracy(1))), "number of decisions"),
    (lambda r: r.comparison({}, {}), "ran nothing"),
    (lambda r: r.training(Curves(), SETTINGS), "no epoch"),
    (lambda r: r.training(curves(), {"towers": [1, 2]}), "towers is none"),
    (lambda r: r.training(curves(), {"rate": float("nan")}), "not finite"),
    (lambda r: r.dataset("no/such/folder"), "there is no dataset in no/such/folder"),
])
def test_what_cannot_be_recorded_is_refused_in_one_sentence_and_changes_nothing(report, record, said):
    before = (report.folder / RECORD).read_bytes()
    with pytest.raises(UserError) as error:
        record(report)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (report.folder / RECORD).read_bytes() == before and LabReport(report.folder).stored == report.stored


def test_a_server_that_nobody_has_asked_is_refused(report):
    with PolicyCore(Still()) as core, PolicyServer(core, port=0).in_background() as idle:
        with pytest.raises(UserError, match="decided nothing yet"):
            report.integration(idle, runs("align", 0.5), runs("align", 0.5))


# --- the command -----------------------------------------------------------------------------------------------------------------------

def run(*arguments):
    """The command's exit code, in this process, whatever environment that is."""
    commands = read_commands()
    return commands["report"].main(parse(["report", *map(str, arguments)], commands))


def test_the_command_builds_checks_and_prints_the_rubric(report, capsys, tmp_path):
    page = tmp_path / "out" / "mine.html"
    assert run(report.folder, "--out", page) == 1
    said = capsys.readouterr().out
    assert f"{len(PARTS)} to do" in said and rubric() in said and Page(page.read_text()).sections == list(PARTS)
    fill_gaps(report)
    assert run(report.folder, "--out", page) == 0
    assert "everything that can be checked automatically is there" in capsys.readouterr().out
    page.write_text("changed")
    assert run(report.folder, "--out", page, "--check") == 1
    assert page.read_text() == "changed"


def test_the_command_says_in_one_sentence_where_there_is_no_record(tmp_path):
    with pytest.raises(UserError, match=r"holds no report\.json: record your runs in the lab's notebook, LabReport\("):
        run(tmp_path)
