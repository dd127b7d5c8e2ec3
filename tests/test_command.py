"""Properties of the command, the installation, the doctor and the notebook runner. What the lessons teach is tested elsewhere.

Every installation here is a real one, of tiny wheels made on the spot, in a copy of the repository, without a network.
"""

import ast
import asyncio
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from queue import Empty

import nbformat
import pytest
import yaml

import labkit
from labkit import install, notebooks, student_copies
from labkit.__main__ import VERBS, main
from labkit.commands.test import names_a_test
from labkit.doctor import PROBES, report, try_in_child
from labkit.errors import UserError
from labkit.paths import ROOT

NOWHERE = "http://127.0.0.1:9/simple"
START = "import sys; sys.path.insert(0, {course!r}); {before}\nfrom labkit.__main__ import main; sys.exit(main())"
IMPORT_NAMES = {"pillow": "PIL", "pytest-xdist": "xdist"}


@pytest.fixture
def course(tmp_path):
    """A copy of what the command needs, with two notebooks and no .venv."""
    folder = tmp_path / "course"
    shutil.copytree(ROOT / "labkit", folder / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    write_notebook(folder / "notebooks" / "00_start_here.ipynb", "import labkit", "import sys\nsys.executable")
    write_notebook(folder / "notebooks" / "01_second.ipynb", "1 + 1")
    return folder


@pytest.fixture
def unmet_course(course):
    """The same with requirements that no interpreter meets and that can be installed from `course / 'wheels'` alone."""
    (course / "requirements.txt").write_text("torch==2.13.0  # all: a stand-in\nlabkit-stand-in==1.0  # all: a stand-in\n")
    make_wheel(course / "wheels", "torch", "2.13.0+cpu")
    make_wheel(course / "wheels", "labkit_stand_in", "1.0")
    return course


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def make_wheel(folder, name, version):
    """The smallest wheel that pip installs."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def environment(**changes):
    """This process's environment without what pytest, pip and labkit left in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PIP_", "LABKIT_", "PYTHONPATH"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | changes


def labkit_in(course, *arguments, before="", **changes):
    """Run the command of the copy in `course`, after the statements `before`."""
    command = [sys.executable, "-c", START.format(course=str(course), before=before), *arguments]
    return subprocess.run(command, cwd=course.parent, env=environment(**changes), capture_output=True, text=True)


def bare_python(program):
    """Run `program` on the standard library alone: no site-packages, no .venv, labkit from the repository."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", program], env=environment(), capture_output=True, text=True)


def assert_one_sentence(finished, *words):
    assert finished.returncode == 2, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("labkit: ") and lines[0].endswith("."), finished.stderr
    for word in words:
        assert word in lines[0]


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_importing_the_package_and_every_verb_loads_no_installed_library():
    modules = {IMPORT_NAMES.get(name, name) for name in install.pins()}
    program = "import sys, labkit.__main__ as command; command.read_commands(); print(*sys.modules)"
    with_packages = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not modules & set(with_packages.stdout.split())
    assert bare_python(program).returncode == 0


def test_every_public_name_is_found_and_another_is_named():
    for name in labkit.__all__:
        assert getattr(labkit, name) is not None and name in dir(labkit)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = labkit.no_such_name


def test_environment_yml_installs_requirements_txt_into_a_supported_python():
    described = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_section,) = [entry["pip"] for entry in described if isinstance(entry, dict)]
    assert pip_section == ["-r requirements.txt"]
    (python,) = [entry for entry in described if str(entry).startswith("python=")]
    assert install.is_supported(tuple(map(int, python.split("=")[1].split("."))))


def test_every_requirement_has_an_exact_version_and_says_who_needs_it():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(install.pins())
    for line in lines:
        assert re.fullmatch(r"[a-z][a-z0-9-]*==\d+(\.\d+)+ +# [a-z].*: .+", line), line


def test_pyproject_names_the_packages_of_requirements_txt_and_the_same_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(project["dependencies"] + project["optional-dependencies"]["test"]) == sorted(install.pins())
    (low, high) = install.PYTHONS
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


def test_the_commands_help_lists_every_verb_and_needs_no_package():
    finished = bare_python("from labkit.__main__ import main; main(['--help'])")
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[0] for line in finished.stdout.splitlines() if re.match(r"    \w", line)] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_needs_no_package(verb):
    finished = bare_python(f"from labkit.__main__ import main; main([{verb!r}, '--help'])")
    assert finished.returncode == 0 and f"labkit {verb}" in finished.stdout, finished.stderr


@pytest.mark.parametrize("error, words", [
    (UserError("the first\n line"), "the first line"),
    (ValueError("a bad value"), "a bad value"),
    (FileNotFoundError(2, "No such file", "data/mug"), "data/mug does not exist"),
])  # fmt: skip
def test_an_error_of_the_user_is_one_line_and_exit_code_2(error, words, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("labkit.__main__.dispatch", fail)
    monkeypatch.delenv("LABKIT_TRACEBACK", raising=False)
    assert main([]) == 2
    assert capsys.readouterr().err == f"labkit: {words}\n"
    monkeypatch.setenv("LABKIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main([])


def test_a_defect_of_the_program_keeps_its_traceback_and_ctrl_c_is_quiet(monkeypatch):
    def fail(argv):
        raise argv[0]

    monkeypatch.setattr("labkit.__main__.dispatch", fail)
    with pytest.raises(KeyError):
        main([KeyError("a defect")])
    assert main([KeyboardInterrupt()]) == 130


def test_an_environment_that_meets_the_requirements_is_used_as_it_is(course):
    finished = labkit_in(course, "lab", "--reset", "00")
    assert finished.returncode == 0, finished.stderr
    assert not (course / ".venv").exists()


def test_what_runs_before_the_version_check_parses_on_python_3_8():
    for name in ("__init__", "__main__", "errors", "paths", "processes", "install"):
        ast.parse((ROOT / "labkit" / f"{name}.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 14, 0)])
def test_another_python_is_told_which_are_needed(course, version):
    finished = labkit_in(course, "lab", before=f"sys.version_info = (*{version}, 'final', 0)")
    assert_one_sentence(finished, "3.11", "3.13", ".".join(map(str, version)))


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_interpreter_is_told_which_are_needed(course, version):
    candidates = [shutil.which(f"python{version}"), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for python in filter(None, candidates):
        finished = subprocess.run([python, "-m", "labkit", "lab"], cwd=course, env=environment(), capture_output=True, text=True)
        if "labkit" in finished.stderr:
            return assert_one_sentence(finished, "3.11", "3.13", f"this is {version}.")
    pytest.skip(f"no Python {version} on this machine")


def test_a_python_without_venv_is_told_the_debian_package(unmet_course):
    for module in ("venv", "ensurepip"):
        assert_one_sentence(labkit_in(unmet_course, "lab", before=f"sys.modules[{module!r}] = None"), "python3-venv")
    assert not (unmet_course / ".venv").exists()


def test_too_little_disk_is_said_before_anything_is_made(unmet_course):
    before = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=2e9)"
    assert_one_sentence(labkit_in(unmet_course, "lab", before=before), "3.5 GB", "2.0 GB")
    assert not (unmet_course / ".venv").exists()


def test_a_folder_that_cannot_be_written_is_named(unmet_course):
    (unmet_course / ".venv.lock").mkdir()  # refuses to be opened for root, too, whom file permissions do not stop
    assert_one_sentence(labkit_in(unmet_course, "lab"), "cannot write", str(unmet_course))


@pytest.mark.slow
def test_a_failure_of_pip_is_one_sentence_and_the_next_attempt_goes_on_from_there(unmet_course):
    elsewhere = f"import labkit.install; labkit.install.CPU_INDEX = {NOWHERE!r}"
    offline = labkit_in(unmet_course, "lab", before=elsewhere, PIP_NO_INDEX="0", PIP_INDEX_URL=NOWHERE, PIP_RETRIES="1")
    assert "1 of 3" in offline.stdout
    assert_one_sentence(offline, "could not reach the package index", "PIP_INDEX_URL")

    (unmet_course / "wheels" / "labkit_stand_in-1.0-py3-none-any.whl").unlink()
    incomplete = labkit_in(unmet_course, "lab", PIP_FIND_LINKS=str(unmet_course / "wheels"))
    assert "1 of 3" not in incomplete.stdout
    assert_one_sentence(incomplete, "pip failed", "labkit-stand-in==1.0", "pip-errors.txt")


@pytest.mark.slow
def test_the_environment_is_made_once_repaired_and_made_afresh_after_an_interruption(unmet_course):
    def reset_00():
        finished = labkit_in(unmet_course, "lab", "--reset", "00", PIP_FIND_LINKS=str(unmet_course / "wheels"))
        assert finished.returncode == 0, finished.stderr
        assert "00_start_here.ipynb is fresh" in finished.stdout
        return finished.stdout

    venv = unmet_course / ".venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    assert "1 of 3" in reset_00()
    first = snapshot(venv)
    assert "of 3" not in reset_00()
    assert snapshot(venv) == first

    elsewhere = subprocess.check_output([python, "-I", "-c", "import labkit; print(labkit.__file__)"], cwd=ROOT.anchor, text=True)
    assert Path(elsewhere.strip()) == unmet_course / "labkit" / "__init__.py"

    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "labkit-stand-in"], check=True)
    assert "1 of 3" not in reset_00()  # without a network, and so from the wheels: the package is back
    subprocess.run([python, "-c", "import labkit_stand_in"], check=True)

    (venv / "labkit-unfinished").touch()
    (venv / "labkit-installed").unlink()
    (venv / "half-a-package").touch()
    assert "1 of 3" in reset_00()
    assert not (venv / "half-a-package").exists()


def test_an_environment_made_with_another_python_is_not_touched(unmet_course):
    venv = unmet_course / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.9.2\n")
    before = snapshot(venv)
    assert_one_sentence(labkit_in(unmet_course, "lab"), str(venv), "3.11 to 3.13")
    assert snapshot(venv) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux does torch come in a CPU and a CUDA build")
@pytest.mark.parametrize("cuda, sources", [(False, ["--no-index", "--index-url", None]), (True, [None])])
def test_the_cpu_build_of_torch_is_looked_for_first_where_there_is_no_gpu(monkeypatch, tmp_path, cuda, sources):
    calls = []
    monkeypatch.setattr(install, "VENV", tmp_path)

    def pip_without_torch(*arguments):
        calls.append(arguments)
        return subprocess.CompletedProcess(arguments, 1, stderr="ERROR: no torch")

    monkeypatch.setattr(install, "pip_install", pip_without_torch)
    with pytest.raises(UserError, match="no torch"):
        install.install_torch(cuda)
    options = [next((argument for argument in call if argument in ("--no-index", "--index-url")), None) for call in calls]
    assert options == sources
    assert all(call[-1] == f"torch=={install.pins()['torch']}" for call in calls)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize("exit_code, found", [(0, True), (9, False)])
def test_a_gpu_is_there_when_nvidia_smi_lists_one(tmp_path, monkeypatch, exit_code, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {exit_code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert install.has_nvidia_gpu() is found


def test_student_copies_are_made_once_and_a_reset_loses_nothing(tmp_path):
    write_notebook(tmp_path / "notebooks" / "00_start_here.ipynb", "1")
    source, work = tmp_path / "notebooks", tmp_path / "work"
    (copy,) = student_copies.make_student_copies(source, work)
    copy.write_text("my work")
    assert student_copies.make_student_copies(source, work) == []
    assert copy.read_text() == "my work"

    kept = []
    for text in ("my work", "my second attempt"):
        copy.write_text(text)
        kept.append(student_copies.reset_student_copy(source / copy.name, work)[1])
    assert [path.read_text() for path in kept] == ["my work", "my second attempt"]
    assert nbformat.read(copy, 4).cells[0].source == "1"


def test_a_notebook_is_found_by_its_number_and_a_wrong_name_lists_the_right_ones(course):
    folder = course / "notebooks"
    for name in ("01", "01_second", "01_second.ipynb", "work/01_second.ipynb"):
        assert notebooks.find_notebook(name, folder).name == "01_second.ipynb"
    for name in ("0", "7"):
        with pytest.raises(UserError, match="00_start_here, 01_second"):
            notebooks.find_notebook(name, folder)


@pytest.mark.slow
def test_run_measures_every_notebook_and_says_where_one_failed(course, tmp_path):
    folder, out = course / "notebooks", tmp_path / "results"
    write_notebook(folder / "01_second.ipynb", "import time\nb = bytearray(200 * 2**20)\ntime.sleep(0.5)", "1 / 0", "'not reached'")
    (folder / "02_junk.ipynb").write_text("{")
    finished = labkit_in(course, "run", "--out", str(out), "--inplace")
    assert finished.returncode == 1, finished.stderr
    with open(out / "results.csv", newline="") as file:
        good, bad, junk = csv.DictReader(file)
    assert (good["status"], bad["status"], junk["status"]) == ("ok", "failed", "failed")
    assert bad["error"] == "cell 2 of 3, ZeroDivisionError: division by zero"
    assert 190 < int(bad["peak_mib"]) - int(good["peak_mib"]) < 260
    assert (out / "results.md").read_text() in finished.stdout

    written_back = nbformat.read(folder / "00_start_here.ipynb", 4)
    assert written_back.metadata["labkit"] == {"minutes": float(good["minutes"]), "peak_mib": int(good["peak_mib"])}
    assert Path(ast.literal_eval(written_back.cells[1].outputs[0].data["text/plain"])) == Path(sys.executable)
    assert "labkit" not in nbformat.read(folder / "01_second.ipynb", 4).metadata
    assert nbformat.read(out / "01_second.ipynb", 4).cells[1].outputs[0].ename == "ZeroDivisionError"


@pytest.mark.slow
def test_lab_serves_the_students_copy_and_passes_on_what_it_does_not_know(course):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["lab", "--no-browser", f"--port={port}", "--IdentityProvider.token=secret"]
    command = [sys.executable, "-c", START.format(course=str(course), before=""), *arguments]
    server = subprocess.Popen(command, cwd=course.parent, env=environment(), stderr=subprocess.DEVNULL)
    try:
        copy = wait_for(f"http://127.0.0.1:{port}/api/contents/work/00_start_here.ipynb?token=secret", server)
        assert json.loads(copy)["content"]["cells"][0]["source"] == "import labkit"
        page = wait_for(f"http://127.0.0.1:{port}/lab?token=secret", server).decode()
        settings = json.loads(re.search(r'id="jupyter-config-data".*?>(.*?)</script>', page, re.DOTALL)[1])
        assert "@jupyterlab/apputils-extension:announcements" in settings["disabledExtensions"]
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address, server, seconds=60):
    """What the server answers at `address`, once it does."""
    for _ in range(seconds * 5):
        try:
            return urllib.request.urlopen(address, timeout=10).read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
    raise AssertionError(f"no answer within {seconds} s")


@pytest.mark.slow
def test_test_runs_the_notebooks_too_and_passes_on_what_it_does_not_know(course):
    (course / "tests").mkdir()
    (course / "tests" / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    write_notebook(course / "notebooks" / "01_second.ipynb", "1 / 0")
    everything = labkit_in(course, "test")
    assert everything.returncode == 1 and "2 failed, 3 passed" in everything.stdout
    chosen = labkit_in(course, "test", "--fast", "-k", "good", "-n0")
    assert chosen.returncode == 0 and "1 passed, 1 deselected" in chosen.stdout


def test_a_pattern_that_happens_to_be_a_folder_is_not_taken_for_a_test(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert names_a_test("tests/test_command.py::test_x") and names_a_test("tests/")
    assert not any(map(names_a_test, ["labkit", "-k", "no/such_file.py"]))


@pytest.mark.slow
def test_doctor_reports_every_probe_and_finds_physics_and_4_bit_weights_working():
    statuses = {name: status for name, status, detail in report()}
    assert {title for title, _, _ in PROBES.values()} <= set(statuses)
    assert set(statuses.values()) <= {"ok", "optional", "differs", "MISSING"}
    for needed in ("physics", "ray camera", "4-bit weights", "JupyterLab", "torch", "other packages"):
        assert statuses[needed] == "ok"


def test_doctor_runs_without_any_package_and_says_so_with_its_exit_code():
    # Without the probes: they run in children of their own, and those would find this environment's packages.
    program = """
import labkit.install, labkit.doctor
labkit.install.is_complete = lambda: False
labkit.doctor.PROBES.clear()
from labkit.__main__ import main
sys.exit(main(["doctor"]))
"""
    finished = bare_python(program)
    assert finished.returncode == 1, finished.stderr
    assert re.search(r"^torch +MISSING +torch is missing$", finished.stdout, re.MULTILINE)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_doctor_survives_a_probe_that_crashes(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    works, detail = try_in_child("gpu")
    assert not works and detail


class MissedMessage:
    """A channel of a client: the message is there, but the first looks do not see it."""

    def __init__(self, unseen):
        self.unseen, self.timeouts = unseen, []

    async def get_msg(self, timeout=None):
        self.timeouts.append(timeout)
        if len(self.timeouts) <= self.unseen:
            raise Empty
        return "the reply"


@pytest.mark.parametrize("timeout", [None, 1800])
def test_a_message_that_zmq_missed_is_found_by_looking_again(timeout):
    channel = MissedMessage(unseen=3)
    notebooks.look_again(channel, seconds=0.01)
    assert asyncio.run(channel.get_msg(timeout)) == "the reply"
    assert channel.timeouts == [0.01] * 4


def test_looking_again_ends_with_the_timeout():
    channel = MissedMessage(unseen=10**9)
    notebooks.look_again(channel, seconds=0.01)
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=0.05))
    assert len(channel.timeouts) > 1 and max(channel.timeouts) <= 0.01
