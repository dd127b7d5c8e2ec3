"""JupyterLab in a real browser: students' copies open, every cell runs, the robot is told what to do, a slider shows another picture."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from labkit.paths import DATA, NOTEBOOKS, ROOT, RUNS
from labkit.student_copies import student_copy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START, MASKING = "00_start_here.ipynb", "01_sft_loss_masking.ipynb"
STUDENT = RUNS / "browser-test"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PATIENCE_MS = 180_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine"),
    pytest.mark.skipif(not (DATA / "tiny_vla" / "model.safetensors").is_file(), reason="the checkpoint is not in data/tiny_vla"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a JupyterLab started by the README's first command; the notebooks are fresh copies, so that nobody's work is touched."""
    folder, port = tmp_path_factory.mktemp("student"), free_port()
    for name in (START, MASKING):
        student_copy(NOTEBOOKS / name, STUDENT / name)
    command = [sys.executable, "-m", "labkit", "lab", "--no-browser", f"--port={port}", "--IdentityProvider.token="]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield address
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def run_all_cells(browser, server, name):
    """The student's copy of a notebook in the browser, every cell run."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{server}/lab/tree/{STUDENT.relative_to(ROOT)}/{name}?reset")
    page.get_by_role("menuitem", name="Run", exact=True).wait_for()
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    # Run All Cells is lost on a kernel that is still starting.
    page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='busy']").first.wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for()
    return page


@pytest.fixture(scope="module")
def start(browser, server):
    page = run_all_cells(browser, server, START)
    yield page
    page.close()


@pytest.fixture(scope="module")
def masking(browser, server):
    page = run_all_cells(browser, server, MASKING)
    yield page
    page.close()


@pytest.mark.parametrize("notebook, pictures", [("start", 4), ("masking", 7)])
def test_no_cell_of_an_unsolved_copy_ends_in_an_error(notebook, pictures, request):
    seen = read_whole_notebook(request.getfixturevalue(notebook))
    assert seen["errors"] == []
    assert seen["pictures"] >= pictures


def test_the_receipt_of_an_unsolved_copy_says_not_attempted(masking):
    bring_into_view(masking, masking.get_by_text("0 of 3 exercises attempted"))
    assert masking.get_by_text("0 of 3 exercises attempted").count() == 1


def test_moving_the_slider_shows_another_picture(masking):
    slider = masking.locator(".jupyter-widgets [role=slider]")
    bring_into_view(masking, slider)
    picture = masking.locator(".widget-interact img")
    before = picture.get_attribute("alt")
    slider.first.focus()
    slider.first.press("ArrowRight")
    masking.wait_for_function("old => document.querySelector('.widget-interact img')?.alt !== old", arg=before)
    after = picture.get_attribute("alt")
    assert "action tokens" in before and "action tokens" in after and before != after


def bring_into_view(page, wanted):
    """Scroll until `wanted` is there; JupyterLab draws only the cells near the window."""
    for cell in page.locator(".jp-Notebook .jp-Cell").all():
        if wanted.count():
            break
        cell.scroll_into_view_if_needed()
    wanted.first.scroll_into_view_if_needed()


def test_a_typed_instruction_moves_the_robot(start):
    page, button = start, start.get_by_role("button", name="Do it")
    bring_into_view(page, button)
    before = page.locator(".jupyter-widgets img").first.get_attribute("src")
    field = page.locator(".jupyter-widgets input[type=text]").first
    field.fill("please grab the red mug")
    field.press("Enter")
    button.click()
    page.wait_for_function("old => document.querySelector('.jupyter-widgets img').src !== old", arg=before)
    assert "please grab the red mug" in page.locator(".jupyter-widgets img").first.get_attribute("alt")
    said = page.locator(".jupyter-widgets").first.inner_text()
    assert "means x" in said and "Result: done" in said


def test_an_unknown_word_is_named(start):
    page = start
    bring_into_view(page, page.get_by_role("button", name="Do it"))
    field = page.locator(".jupyter-widgets input[type=text]").first
    field.fill("pick up the banana")
    field.press("Enter")
    page.get_by_role("button", name="Do it").click()
    page.locator(".jupyter-widgets").get_by_text("does not know").first.wait_for()
    assert "banana" in page.locator(".jupyter-widgets").first.inner_text()


def read_whole_notebook(page):
    """Errors and pictures of all cells; JupyterLab draws only the cells in view, so every one is brought into view."""
    errors, pictures = [], 0
    cells = page.locator(".jp-Notebook .jp-Cell")
    for index in range(cells.count()):
        cell = cells.nth(index)
        cell.scroll_into_view_if_needed()
        errors += cell.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
        errors += cell.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        pictures += cell.locator(".jp-OutputArea-output img").count()
    return {"errors": [text for text in errors if "Error" in text], "pictures": pictures}
