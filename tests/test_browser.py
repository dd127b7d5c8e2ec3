"""JupyterLab in a real browser: the first notebook opens, every cell runs, an instruction is typed and the robot moves."""

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
NOTEBOOK = "00_start_here.ipynb"
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
    """Address of a JupyterLab started by the README's first command; the notebook is a copy, so that nobody's work is touched."""
    folder, port = tmp_path_factory.mktemp("student"), free_port()
    student_copy(NOTEBOOKS / NOTEBOOK, STUDENT / NOTEBOOK)
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
def page(server):
    """The notebook in the browser, every cell run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{server}/lab/tree/{STUDENT.relative_to(ROOT)}/{NOTEBOOK}?reset")
        page.get_by_role("menuitem", name="Run", exact=True).wait_for()
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        # Run All Cells is lost on a kernel that is still starting.
        page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status='busy']").first.wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for()
        yield page
        browser.close()


def test_no_cell_ends_in_an_error(page):
    seen = read_whole_notebook(page)
    assert seen["errors"] == []
    assert seen["pictures"] >= 4


def show_widget(page):
    """Bring the widget into view; JupyterLab draws only the cells near the window."""
    for cell in page.locator(".jp-Notebook .jp-Cell").all():
        if page.get_by_role("button", name="Do it").count():
            break
        cell.scroll_into_view_if_needed()
    page.get_by_role("button", name="Do it").scroll_into_view_if_needed()


def test_a_typed_instruction_moves_the_robot(page):
    show_widget(page)
    button = page.get_by_role("button", name="Do it")
    before = page.locator(".jupyter-widgets img").first.get_attribute("src")
    field = page.locator(".jupyter-widgets input[type=text]").first
    field.fill("please grab the red mug")
    field.press("Enter")
    button.click()
    page.wait_for_function("old => document.querySelector('.jupyter-widgets img').src !== old", arg=before)
    assert "please grab the red mug" in page.locator(".jupyter-widgets img").first.get_attribute("alt")
    said = page.locator(".jupyter-widgets").first.inner_text()
    assert "means x" in said and "Result: done" in said


def test_an_unknown_word_is_named(page):
    show_widget(page)
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
