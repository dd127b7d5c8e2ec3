"""Properties of a lab report's page: every number on it was stored or follows from what was, it needs nothing else, and hostile text stays text."""

import base64
import hashlib
import io
import json
import re
from itertools import chain

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from labkit.lab_report import LabReport
from labkit.lab_report.parts import PARTS
from labkit.lab_report.record import RECORD
from tests.lab_report_runs import compared, fill_gaps, notebook_of, page_of, run_folder, runs

pytest_plugins = ["tests.lab_report_fixtures"]

HOSTILE = '<script>alert("1")</script> ]] | `x` $\\frac{1}$ { {{ 7 * 7 }} {% raw %} ![a](b) \u202e "quoted" \'single\' & <img src=x onerror=y>'
OURS = {"html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "p", "div", "figure", "img", "table", "thead", "tbody",
        "tr", "th", "td"}


def test_the_page_has_every_part_in_the_sheet_s_order_and_needs_nothing_else(whole):
    page = page_of(whole)
    assert page.sections == [*PARTS, "marking"]
    assert {tag for tag, _ in page.tags} <= OURS
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert all(len(alt) > 40 for alt in page.alts)


def test_a_browser_may_load_nothing_and_use_this_style_alone(whole):
    text = (whole.folder / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none';") and "script" not in policy and "unsafe" not in policy


def test_every_cell_of_a_table_that_folds_on_a_phone_says_what_it_is(whole):
    tags = page_of(whole).tags
    assert sum(attributes.get("class") == "many" for _, attributes in tags) == 2
    labels = [attributes["data-label"] for _, attributes in tags if "data-label" in attributes]
    for label in ("Episodes", "Generic", "Fine-tuned", "Difference", "p", "Median"):
        assert labels.count(label) >= 2, label


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
        elif isinstance(value, str) and len(value) < 60:
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


def measured(page):
    """The cells and the pictures' texts that stand before the rubric."""
    return [*page.cells[: next(i for i, cell in enumerate(page.cells) if cell.startswith("Checked automatically"))], *page.alts]


def test_every_number_that_is_shown_was_stored_or_follows_from_what_was(whole):
    said, known = measured(page_of(whole)), derived(json.loads((whole.folder / RECORD).read_text()))
    assert strangers(said, known) == []
    # The comparison tells: of the same numbers, each with another digit at its end, hardly one is known.
    precise = re.findall(r"\d[\d,]*\.\d+|\d[\d,]*\d\d\b", " ".join(said))
    others = [text[:-1] + str((int(text[-1]) + 3) % 10) for text in precise]
    assert len(others) > 60 and len(strangers(others, known)) > 0.75 * len(others)


def test_what_the_parts_say_is_what_was_measured(whole):
    text = " | ".join(page_of(whole).cells)
    for said in ("50 | 50 | 100", "0 errors, 0 warnings", "align: ", "0.4321 and 0.2103", "0.3987 in epoch 1", "1,234 of 56,789", "head_rate | 0.001",
                 "patience | None", "variant | last-layers", "36.90 mm | 12.30 mm", "7.07 degrees", "13.68 % | 4.56 %", "on 44 decisions",
                 "answered | 22", "refused (4xx) | 3", "failed (5xx) | 0", "decisions | 22", "below 0.001"):
        assert said in text, said


def test_a_small_p_is_called_small_and_a_large_one_is_shown(tmp_path):
    report, alike = LabReport(tmp_path), runs("align", 0.5)
    compared(report, generic={"alike": alike}, fine_tuned={"alike": alike})
    report.build()
    assert "1.000" in page_of(report).cells and "below 0.001" not in page_of(report).cells


def test_the_rubric_stands_on_the_page_with_all_its_points(whole):
    text = " | ".join(page_of(whole).cells)
    assert all(criterion in text for part in PARTS.values() for _, criterion in part.rubric)
    assert sum(int(points) for points in re.findall(r"\| (\d) points?(?= \|)", text)) == sum(p for part in PARTS.values() for p, _ in part.rubric)


def test_many_instructions_are_counted_together(tmp_path):
    report = LabReport(tmp_path)
    splits, tasks = {"train": {"episodes": 78, "successes": 78, "decisions": 90}}, {f"task {i}": i for i in range(1, 13)}
    report.stored["dataset"] = {"folder": "/many", "splits": splits, "tasks": tasks, "operators": {"": 78}, "errors": 0, "warnings": 0,
                                "problems": []}
    report.build()
    cells = page_of(report).cells
    assert "task 12: 12 episodes" in cells and "task 2: 2 episodes" not in cells and "2 others: 3 episodes" in cells


def test_hostile_text_is_shown_and_nowhere_obeyed(tmp_path):
    clean = HOSTILE.replace("\u202e", " ")
    report = LabReport(tmp_path, author=HOSTILE)
    report.training(run_folder(tmp_path / "run"), **{HOSTILE: HOSTILE})
    compared(report, generic={HOSTILE: runs("align", 0.2)}, fine_tuned={HOSTILE: runs("align", 0.8)},
             accuracy=({HOSTILE: {"error": 0.5, "unit": HOSTILE}},) * 2)
    report.build()
    fill_gaps(report, HOSTILE)
    report.build()
    page = page_of(report)
    assert {tag for tag, _ in page.tags} <= OURS
    assert page.cells.count(clean) == 4 and clean in page.words[0] and clean in page.alts[1]
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    ours = "\n".join(cell.source for cell in notebook_of(report).cells if "facts" in cell.metadata.get("labkit", {}))
    assert not re.search(r"[<>$\\\u202e]|\]\(b\)", ours)
    tables = re.findall(r"(?:^\| .*\n?)+", ours, re.MULTILINE)
    assert len(tables) == 5 + 1 + len(PARTS) and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_a_made_up_record_cannot_put_markup_into_the_page(report):
    path = report.folder / RECORD
    stored = json.loads(path.read_text())
    stored["integration"]["policy"] = stored["author"] = "<script>x</script>"
    stored["dataset"]["splits"] = {"<b>": {"episodes": 1, "successes": 1, "decisions": 1}}
    path.write_text(json.dumps(stored))
    LabReport(report.folder).build()
    page = page_of(report)
    assert not {"script", "b"} & {tag for tag, _ in page.tags} and "<b>" in page.cells and "<script>x</script>" in page.cells
