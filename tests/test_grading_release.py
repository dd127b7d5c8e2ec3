"""Properties of the students' bundle: it is whole and works alone, the same every time, and nothing in it gives a solution away."""

import ast
import builtins
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from recovering import blocks, line_of, nearest, solutions, steps, windows
from test_student_copies import assert_released_alike, nbgrader

from labkit.__main__ import VERBS
from labkit.commands.release import main as release_command
from labkit.commands.release import table
from labkit.errors import UserError
from labkit.exercises.exercise import all_exercises
from labkit.grading import release as releasing
from labkit.grading.assignment import default_assignment, read_assignment
from labkit.grading.release import ABOUT, bundle, from_another_release, lessons, without_hidden_tests, write, zipped
from labkit.install import pins
from labkit.paths import NOTEBOOKS, ROOT
from labkit.student_copies import make_student_copies, student_copy, without_solutions
from labkit.submission.cells import cells_of, exercise_ids_of, read_notebook

STEMS = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
EXERCISES = all_exercises()
# A solution's line that is at least so long, without blanks, is found nowhere in a bundle but in a hint.
TELLING = 20
COMMON_LINES = {
    "targets=labels[:,1:]": "the shift, which the text of lesson 1 gives; every loss of the package begins with it",
    "outputs,inputs=weight.shape": "names the two sides of a matrix",
    "forlaginrange(longest+1):": "says what the docstring of the exercise says: for each lag from 0 to longest",
}
# How alike a solution and other code may be (recovering.nearest). Known mistakes are a solution with one error in it, so they are left out:
# none passes, as tests/test_exercises.py shows for each, and none is the solution itself.
ALIKE = 0.8
# What in the package passes as an answer, and why it is no solution to copy: another way to the same numbers, in a module that the exercise's cell
# cannot import.
ORACLES = {
    "adapters-module": {"labkit.adapters.BottleneckAdapter": "torch's Sequential with a sum behind it; what the lesson's robots are trained with"},
    "adapters-start": {"labkit.adapters.identity_state": "takes names and shapes from a module, and fills one of its tensors"},
    "adapters-count": {"labkit.adapters.adapter_size": "counts the entries of a list of shapes"},
    "deploy-mixed-batch": {"labkit.routing.mixed_by_peft": "peft's own mixed batch"},
    "deploy-router": {
        "labkit.routing.router_scores": "a least-squares fit, numpy's covariance, a linear system for each query",
        "labkit.exercises.adapters_at_deployment._router": "the check's reference: scipy's Mahalanobis distances",
    },
    "deploy-risk-coverage": {"labkit.routing.risk_coverage": "scipy's ranks, and numpy counts by rank"},
    "deploy-ensemble": {"labkit.routing.averaged_log_probabilities": "one einsum"},
    "ewc-fisher": {"labkit.forgetting.output_fisher": "in closed form, without autograd"},
    "ewc-penalty": {"labkit.forgetting.quadratic_penalty": "torch's weighted mse_loss"},
    "ewc-mixed-loss": {"labkit.forgetting.mixed_loss": "a weight for each sample, and one product"},
    "ewc-kl-anchor": {"labkit.forgetting.kl_divergence": "torch's kl_div"},
    "few-shot-lag": {
        "labkit.preprocessing.lag_correlations": "numpy's correlation, with its own rule for constant records",
        "labkit.exercises.few_shot._by_lag": "the frame of the known mistakes, with a correlation written out",
    },
    "few-shot-clean": {
        "labkit.preprocessing.pair_decisions": "numpy's searchsorted",
        "labkit.exercises.few_shot._pairs": "the frame of the known mistakes, by bisection",
    },
    "few-shot-split": {"labkit.preprocessing.held_out_rows": "compares every decision with every episode"},
    "instruct-log-likelihood": {"labkit.experiments.instruction_tuning.log_likelihood": "torch's cross_entropy"},
    "instruct-error-matrix": {"labkit.experiments.instruction_tuning.success_matrix": "filters the episodes for each cell"},
    "instruct-attention-share": {"labkit.experiments.instruction_tuning.attention_share": "multiplies by masks"},
    "lab-rates": {"labkit.exercises.lab_task_specific_vla._rates": "the frame of the known mistakes, which sorts the layers of each tower"},
    "lab-moved": {"labkit.waypoint_regression.step_faults": "compares elementwise and subtracts sets"},
    "lab-scale": {"labkit.exercises.lab_task_specific_vla._statistics": "the frame of the known mistakes, in double precision"},
    "lab-best": {"labkit.exercises.lab_task_specific_vla._followed": "the frame of the known mistakes; what is better is an argument"},
    "lab-int8": {
        "labkit.serving.quantisation.int8_per_row": "torch's own fake quantisation",
        "labkit.exercises.lab_deployment._int8": "the frame of the known mistakes, row by row, with what a scale is made of as an argument",
    },
    "lab-cache": {
        "labkit.serving.caching.answered_from": "asks the cache of the course, which keeps a Python OrderedDict",
        "labkit.exercises.lab_deployment._served": "the frame of the known mistakes, which makes room before it adds",
    },
    "lab-deadline": {
        "labkit.serving.monitor.sliding": "numpy's percentile",
        "labkit.exercises.lab_deployment._watched": "the frame of the known mistakes, with the window's ends as arguments",
    },
    "lab-drift": {
        "labkit.serving.monitor.page_hinkley": "Page's recursion, which needs no minimum",
        "labkit.exercises.lab_deployment._evidence": "the frame of the known mistakes; which mean and which minimum are arguments",
    },
    "lora-layer": {"labkit.exercises.lora_parameter_counting._Layer": "the frame of the known mistakes, which merges before it multiplies"},
    "lora-merge": {"labkit.peft_lora.merged_by_peft": "peft's own merge"},
    "lora-rank-needed": {"labkit.experiments.lora.rank_for": "numpy's singular values, by what is lost instead of what is kept"},
    "qlora-levels": {"labkit.exercises.qlora._right_levels": "the check's reference: Python's NormalDist, one probability after the other"},
    "qlora-bits": {"labkit.exercises.qlora._bits": "the frame of the known mistakes: all bits that are stored, over the weights"},
    "sft-labels": {
        "labkit.batches.supervised_sequence": "torch's pad",
        "labkit.exercises.sft_loss_masking._right_labels": "the check's reference: Python lists, one token after the other",
    },
    "sft-masked-loss": {
        "labkit.sft.action_token_loss": "torch's cross_entropy",
        "labkit.exercises.sft_loss_masking._reference_loss": "the check's reference: one position after the other",
    },
    "sft-logit-gradient": {"labkit.exercises.sft_loss_masking._gradient": "the frame of the known mistakes, by a product with the mask"},
}

every_lesson = pytest.mark.parametrize("stem", STEMS)


@pytest.fixture(scope="module")
def assignment():
    return default_assignment()


@pytest.fixture(scope="module")
def files(assignment):
    """Name -> content of the bundle with every lesson."""
    return bundle(assignment, STEMS)


@pytest.fixture(scope="module")
def placed(files, tmp_path_factory):
    """The folder of that bundle."""
    return write(files, tmp_path_factory.mktemp("release") / "course")[0]


def sources(files):
    """Name -> Python source of every module of a bundle, and `NOTEBOOK, cell N` -> that of every code cell."""
    for name, content in files.items():
        if name.endswith(".py"):
            yield name, content.decode()
        elif name.endswith(".ipynb"):
            cells = enumerate(json.loads(content)["cells"], start=1)
            yield from ((f"{name}, cell {i}", plain(cell)) for i, cell in cells if cell["cell_type"] == "code")


def plain(cell):
    """A code cell without lines that only a notebook understands."""
    return "\n".join(line for line in "".join(cell["source"]).split("\n") if not line.lstrip().startswith(("%", "!")))


def texts(files):
    """Name -> everything that can be read in a file, without blanks; of notebooks what stands in cells that are no hint."""
    for name, content in files.items():
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if name.endswith(".ipynb"):
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if "hints" not in cell["metadata"].get("tags", []))
        yield name, "".join(text.split())


def regions(kind):
    """(grade_id, text) of every solution region in cells of that type."""
    for stem in STEMS:
        for cell in read_notebook(NOTEBOOKS / f"{stem}.ipynb")["cells"]:
            if cell["cell_type"] == kind:
                for text in re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", "".join(cell["source"]), re.DOTALL):
                    yield cell["metadata"]["nbgrader"]["grade_id"], text


def telling_lines():
    """(grade_id, line) of every line of a solution that says enough to be recognised."""
    found = {(id, line_of(line)) for id, text in regions("code") for line in text.splitlines()}
    return {(id, line) for id, line in found if len(line) >= TELLING}


def sentences():
    """(grade_id, sentence) of every model answer, without blanks."""
    found = {(id, "".join(part.split())) for id, text in regions("markdown") for part in re.split(r"(?<=[.?!:;,]) ", text)}
    return {(id, part) for id, part in found if len(part) >= TELLING}


def all_solutions():
    """grade_id -> the regions of its solution, as lists of statements."""
    return {id: found for stem in STEMS for id, found in solutions(read_notebook(NOTEBOOKS / f"{stem}.ipynb")["cells"]).items()}


def mistakes_in(name):
    """Names of the known mistakes that a module of the bundle defines."""
    module = name.removesuffix(".py").replace("/", ".")
    return {mistake.__name__ for e in EXERCISES.values() if type(e).__module__ == module for mistake in e.misconceptions.values()}


def in_bundle(folder, program, *arguments, **changes):
    """Run a program with the bundle's labkit and no other; what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # An environment of the course has the repository on its path.
    program = f"import sys; sys.path[:] = [{str(folder)!r}, *(path for path in sys.path if path != {str(ROOT)!r})]\n{program}"
    finished = subprocess.run([sys.executable, "-P", "-c", program, *arguments], cwd=folder, env=kept | {"LABKIT_NO_INSTALL": "1"} | changes,
                              capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def verb_in(folder, *arguments):
    return in_bundle(folder, "from labkit.__main__ import main; sys.exit(main())", *arguments)


def test_a_bundle_holds_what_the_course_needs_and_nothing_of_the_instructors(files):
    needed = {"README.md", "LICENSE", "requirements.txt", "environment.yml", "pyproject.toml", ABOUT, "labkit/__main__.py", "data/claims.json",
              "labkit/jupyter/jupyter_server_config.json", "data/tiny_vla/model.safetensors", "data/sweeps/lora.json",
              "data/demonstrations/stack/train/actions.json", *(f"notebooks/{stem}.ipynb" for stem in STEMS)}
    assert needed <= set(files) and list(files) == sorted(files)
    parts = {part for name in files for part in name.split("/")}
    assert not parts & {"grading", "tests", "second_solutions", "assignments", ".git", ".cache", "__pycache__", "work", "runs", "release.py"}
    assert not [name for name in files if name.startswith((".", "/")) or ".." in name or name.endswith((".pyc", ".toml")) and "/" in name]


def test_every_module_is_the_repository_s_own_but_for_hidden_tests(files):
    shipped = {name for name in files if name.endswith(".py")}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "labkit").rglob("*.py")}
    assert {name for name in ours - shipped if not name.startswith("labkit/grading/")} <= set(releasing.LEFT_OUT)
    for name in shipped:
        source = (ROOT / name).read_text(encoding="utf-8")
        if name.startswith("labkit/exercises/"):
            source = without_hidden_tests(source)
        assert files[name].decode() == source, name


def test_no_module_of_a_bundle_imports_what_is_left_out(files):
    for name, source in sources(files):
        if name.endswith(".py"):
            imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)} | {
                alias.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for alias in n.names}
            assert not [module for module in imported if (module or "").startswith("labkit.grading")], name


def test_a_bundle_asks_for_every_package_that_it_imports_and_for_none_of_the_tests_and_the_grader(files):
    lines = [line.split("#")[0].strip() for line in files["requirements.txt"].decode().splitlines()]
    asked = {line.split("==")[0] for line in lines if line}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert asked < set(pins()) and not asked & {"pyseccomp", *extras["test"]}
    names = {"pillow": "PIL", "pytest-xdist": "xdist", "pyseccomp": "seccomp", "pyyaml": "yaml"}
    left_out = {names.get(name, name) for name in set(pins()) - asked}
    for name, source in sources(files):
        nodes = list(ast.walk(ast.parse(source)))
        imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        imported |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        assert not imported & left_out, name


@every_lesson
def test_a_lesson_is_the_student_s_copy_with_its_release_and_without_widgets(stem, files, assignment, tmp_path):
    student_copy(NOTEBOOKS / f"{stem}.ipynb", tmp_path / "copy.ipynb")
    released = nbformat.reads(files[f"notebooks/{stem}.ipynb"].decode(), as_version=4)
    nbformat.validate(released)
    assert_released_alike(released, nbformat.read(tmp_path / "copy.ipynb", as_version=4))
    assert "widgets" not in released.metadata
    assert (released.metadata.labkit.release, released.metadata.labkit.assignment) == (assignment.release, "all-lessons")
    assert re.fullmatch("[0-9a-f]{12}", assignment.release)


def test_a_bundle_says_what_it_is(files, assignment):
    about = json.loads(files[ABOUT])
    assert (about["assignment"], about["release"]) == ("all-lessons", assignment.release)
    assert [lesson["notebook"] for lesson in about["lessons"]] == STEMS
    asked = {id: points for lesson in about["lessons"] for id, points in lesson["exercises"].items()}
    assert asked == {exercise.id: exercise.points for _, exercise in assignment.exercises}


def test_a_small_assignment_has_its_lessons_the_introduction_and_what_is_asked_for(tmp_path):
    (tmp_path / "roster.csv").write_text("id\nhacker\n")
    (tmp_path / "week.toml").write_text(
        'notebooks = ["04", "08_adapters_at_deployment"]\nleave_out = ["lora-merge"]\ndeadline = 2031-03-27T23:59:00+01:00\ngrace_minutes = 15\n'
        'penalty_per_day = 0.1\nmost_penalty = 0.5\nroster = "roster.csv"\n[points]\nlora-count = 5\n'
        '[performance]\ntask = "stack"\npoints = 10\nretention_tasks = ["pick"]\n')
    week = read_assignment(tmp_path / "week.toml")
    found = bundle(week, also=["05_qlora"])
    names = [name.partition("/")[2] for name in found if name.startswith("notebooks/")]
    assert names == ["00_start_here.ipynb", "04_lora_parameter_counting.ipynb", "05_qlora.ipynb", "08_adapters_at_deployment.ipynb"]
    readme = found["README.md"].decode()
    for said in ("2031-03-27 23:59+01:00", "10 % of the points", "50 % at most", "adapter for the task `stack`", "`08_adapters_at_deployment.ipynb`",
                 f"release `{week.release}`"):
        assert said in readme, said
    assert "   - `05_qlora.ipynb`" not in readme and "hacker" not in readme
    graded = {lesson.notebook: (len(lesson.exercises), lesson.points) for lesson in lessons(week, ["05_qlora"])}
    assert graded["05_qlora"] == graded["00_start_here"] == (0, 0)
    assert graded["04_lora_parameter_counting"] == (3, 5 + 5 + 4 + 4)
    assert re.search(r"^04_lora_parameter_counting +3 +1 +18$", table(lessons(week, [])), re.MULTILINE)
    assert not any(b"hacker" in content for content in found.values())


def test_the_same_repository_gives_the_same_bundle_and_the_same_zip_file(files, assignment):
    again = bundle(assignment, STEMS)
    assert again == files and list(again) == list(files)
    few = {name: content for name, content in files.items() if name.startswith("notebooks/")}
    packed = zipped(few, "course")
    assert packed == zipped(few, "course")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert {name: archive.read(f"course/{name}") for name in few} == few and archive.testzip() is None


def test_no_line_of_a_solution_stands_in_any_file(files):
    found = dict(texts(files))
    lines = telling_lines()
    assert len({id for id, _ in lines}) == len(EXERCISES)
    assert [(id, line, name) for id, line in sorted(lines) if line not in COMMON_LINES for name, text in found.items() if line in text] == []
    assert set(COMMON_LINES) <= {line for _, line in lines}


def test_no_part_of_a_model_answer_stands_in_any_file(files):
    found, parts = dict(texts(files)), sentences()
    assert len({id for id, _ in parts}) == sum(text.count("YOURANSWERHERE") for name, text in found.items() if name.startswith("notebooks/"))
    assert [(id, part, name) for id, part in sorted(parts) for name, text in found.items() if part in text] == []


@every_lesson
def test_what_gives_a_solution_away_would_be_found(stem):
    """In the source notebook, every telling line and every part of a model answer is."""
    notebook = read_notebook(NOTEBOOKS / f"{stem}.ipynb")
    (text,) = dict(texts({"a.ipynb": json.dumps(notebook).encode()})).values()
    ids = {cell["metadata"].get("nbgrader", {}).get("grade_id") for cell in notebook["cells"]}
    for search in (telling_lines, sentences):
        assert [found for id, found in search() if id in ids and found not in text] == []


def test_no_code_of_a_bundle_is_like_a_solution_whatever_its_names(files):
    code = [(name, window) for name, source in sources(files) for window in windows(source, mistakes_in(name))]
    of = {window: name for name, window in code}
    for id, parts in all_solutions().items():
        for part in parts:
            too_near = [(round(likeness, 2), of[window], *window[:2]) for likeness, window in nearest(steps(part), of, ALIKE)]
            assert too_near == [], id


def test_no_known_mistake_is_a_solution_with_other_names(files):
    for name, source in sources(files):
        if name.startswith("labkit/exercises/"):
            found = {part[-1] for part in windows(source)}
            assert [id for id, parts in all_solutions().items() if any(steps(part) in found for part in parts)] == [], name


class Renamed(ast.NodeTransformer):
    """Every name that the code itself chose, changed."""

    def visit_Name(self, node):
        return node if node.id in ("torch", "self", *dir(builtins)) else ast.Name(f"my_{node.id}", node.ctx)


@pytest.mark.parametrize("id", EXERCISES)
def test_a_solution_with_other_names_and_another_alias_of_the_library_would_be_found(id):
    for part in all_solutions()[id]:
        text = "\n".join(ast.unparse(Renamed().visit(node)) for node in part).replace("torch.nn.functional", "F")
        copied = f"x = 1\ndef other():\n    y = 2\n    \n{'    if True:'}\n" + "\n".join("        " + line for line in text.splitlines())
        assert max(likeness for likeness, _ in nearest(steps(part), list(windows(copied)), ALIKE)) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the limits of the search are those of POSIX")
def test_no_function_of_the_package_passes_as_an_answer_but_the_independent_ones(tmp_path):
    """All hidden cases are asked of everything that could take them. What passes cannot be imported by the exercise's cell."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("recovering.py"))]
    finished = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert {id: set(names) for id, names in found.items()} == {id: set(names) for id, names in ORACLES.items()}


def test_no_oracle_can_be_imported_by_the_cell_of_its_exercise():
    for id, names in ORACLES.items():
        withheld = (*EXERCISES[id].withheld, type(EXERCISES[id]).__module__)
        assert [name for name in names if not any(name.startswith(f"{module}.") for module in withheld)] == [], id


def test_a_bundle_has_no_mark_no_hidden_case_and_nothing_that_only_hidden_cases_use(files):
    for name, source in sources(files):
        assert "HIDDEN TESTS" not in source and "BEGIN SOLUTION" not in source or name == "labkit/student_copies.py", name
        if name.startswith("labkit/exercises/"):
            assert unused(source) == unused((ROOT / name).read_text(encoding="utf-8")), name
    assert sum((ROOT / name).read_text(encoding="utf-8").count("### BEGIN HIDDEN TESTS") for name in files if "/exercises/" in name) >= len(EXERCISES)


def unused(source):
    """Private names that a source defines at its top and does not use."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.startswith("_")} - used


@pytest.mark.parametrize("text", [
    "### BEGIN HIDDEN TESTS\nx = 1\n", "x = 1\n### END HIDDEN TESTS\n", "y = 2  ### BEGIN HIDDEN TESTS\nx = 1\n### END HIDDEN TESTS\n",
], ids=["no end", "no beginning", "not alone"])
def test_a_mark_without_its_other_end_is_named_and_nothing_is_released(text, assignment, monkeypatch):
    source = ROOT / "labkit" / "exercises" / "qlora.py"
    whole = source.read_text(encoding="utf-8") + text
    monkeypatch.setattr(releasing, "_package", lambda: [("labkit/exercises/qlora.py", source)])
    monkeypatch.setattr(Path, "read_text", lambda self, **how: whole if self == source else io.open(self, **how).read())
    with pytest.raises(UserError, match=r"qlora\.py: `(BEGIN|END) HIDDEN TESTS`"):
        bundle(assignment)


CHECKED = """
import json
from pathlib import Path
from labkit import check
from labkit.exercises.exercise import all_exercises
from labkit.paths import NOTEBOOKS
from labkit.student_copies import make_student_copies
from labkit.submission.cells import cells_of, read_notebook

asked = all_exercises()
(copy,) = [path for path in make_student_copies(NOTEBOOKS, Path(sys.argv[1])) if path.stem == "04_lora_parameter_counting"]
cells = cells_of(read_notebook(copy), ["lora-count"])
exec(cells.exercises["lora-count"])
stub = check(count_lora)
right = check(lambda shapes, rank: rank * sum(map(sum, shapes)), "lora-count")
found = {"drawn": {id: [len(e.drawn()), len(e.drawn(hidden=True))] for id, e in asked.items()}, "points": [stub, right],
         "files": [m.__file__ for n, m in sorted(sys.modules.items()) if n.partition(".")[0] == "labkit"], "path": sys.path}
print(json.dumps(found))
"""


def test_alone_a_bundle_makes_student_copies_checks_them_and_knows_public_cases_only(placed, files, tmp_path):
    said = in_bundle(placed, CHECKED, str(tmp_path / "work"))
    assert "lora-count: not attempted (0 of 3 points)" in said and "lora-count: correct (3 of 3 points)" in said
    found = json.loads(said.splitlines()[-1])
    assert found["points"] == [0, 3]
    assert found["drawn"] == {id: [len(e.drawn())] * 2 for id, e in EXERCISES.items()}
    assert found["files"] and all(Path(file).is_relative_to(placed) for file in found["files"]) and str(ROOT) not in found["path"]
    assert {f"notebooks/{path.name}": path.read_bytes() for path in (tmp_path / "work").iterdir()} == {
        name: content for name, content in files.items() if name.startswith("notebooks/")}


def test_a_copy_of_a_released_lesson_is_the_lesson_and_keeps_its_definitions(placed, files, tmp_path):
    for copy in make_student_copies(placed / "notebooks", tmp_path):
        assert copy.read_bytes() == files[f"notebooks/{copy.name}"]
        notebook = read_notebook(copy)
        for id in exercise_ids_of(notebook):
            source = cells_of(notebook, [id]).exercises[id]
            assert re.search(rf"^(def|class) {EXERCISES[id].entry}\b", source, re.MULTILINE) and "raise NotImplementedError()" in source


def test_alone_the_command_offers_what_students_need(placed):
    said = verb_in(placed, "--help")
    offered = [line.split()[0] for line in said.splitlines() if re.match(r"    \w", line)]
    assert offered == [verb for verb in VERBS if verb not in ("test", "release", "grade")]
    assert "is fresh" in verb_in(placed, "lab", "--reset", "04")
    mine, given = ((placed / folder / "04_lora_parameter_counting.ipynb").read_bytes() for folder in ("work", "notebooks"))
    assert mine == given


@pytest.mark.slow
def test_alone_the_doctor_finds_everything(placed):
    said = verb_in(placed, "doctor")
    assert str(placed) in said and "All that the course needs works here." in said


def test_the_real_nbgrader_collects_released_lessons_from_a_zip_file(placed, tmp_path):
    archive = tmp_path / "downloaded" / "ps1" / "archive"
    archive.mkdir(parents=True)
    stem = "04_lora_parameter_counting"
    (tmp_path / "source" / "ps1").mkdir(parents=True)
    (tmp_path / "source" / "ps1" / f"{stem}.ipynb").write_bytes((NOTEBOOKS / f"{stem}.ipynb").read_bytes())
    handed_in = (placed / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8")
    with zipfile.ZipFile(archive / "all.zip", "w") as downloaded:
        for student in ("bitdiddle", "hacker"):
            downloaded.writestr(f"{student}_{stem}.ipynb", handed_in.replace("YOUR ANSWER HERE", student))
    names = r"--FileNameCollectorPlugin.named_regexp=(?:.*/)?(?P<student_id>[a-z]+)_(?P<file_id>\d\w+)\.ipynb"
    nbgrader(tmp_path, "zip_collect", "ps1", names)
    for student in ("bitdiddle", "hacker"):
        collected = read_notebook(tmp_path / "submitted" / student / "ps1" / f"{stem}.ipynb")
        assert exercise_ids_of(collected) == [id for id in EXERCISES if id.startswith("lora-")]
        assert student in [line for cell in collected["cells"] for line in "".join(cell["source"]).splitlines()]


FEW = {"labkit/__init__.py": b"first", "notebooks/a.ipynb": b"{}", ABOUT: b'{"release": "0123456789ab"}'}
OTHERS = {"labkit/__init__.py": b"second", ABOUT: b'{"release": "ba9876543210"}'}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_written_and_an_earlier_one_is_replaced_only_on_demand(tmp_path):
    out = tmp_path / "new" / "course"
    assert write(FEW, out, also_zip=True) == [out, out.with_name("course.zip")] and contents(out) == FEW
    with pytest.raises(UserError, match=r"holds the bundle 0123456789ab already: add --force"):
        write(OTHERS, out)
    with pytest.raises(UserError, match=r"course\.zip is there already"):
        write(OTHERS, out, also_zip=True)
    write(OTHERS, out, replace=True, also_zip=True)
    assert contents(out) == OTHERS and sorted(path.name for path in out.parent.iterdir()) == ["course", "course.zip"]
    with zipfile.ZipFile(out.with_name("course.zip")) as archive:
        assert sorted(archive.namelist()) == sorted(f"course/{name}" for name in OTHERS)


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    write(FEW, tmp_path / "out")
    assert contents(tmp_path / "out") == FEW


@pytest.mark.parametrize("make, said", [
    (lambda out: out.write_text("mine"), "is a file"),
    (lambda out: (out.mkdir(), (out / "thesis.txt").write_text("mine")), "is not empty and holds no bundle"),
    (lambda out: (out.mkdir(), (out / ABOUT).write_text("[]")), "is not empty and holds no bundle"),
    (lambda out: (write(FEW, out), (out / "work").mkdir()), "also holds work, which no bundle has"),
], ids=["a file", "somebody's folder", "another release.json", "a bundle that somebody works in"])
def test_what_is_no_bundle_is_never_replaced(make, said, tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said) as raised:
        write(OTHERS, tmp_path / "out", replace=True)
    assert contents(tmp_path) == before and str(tmp_path / "out") in str(raised.value) and str(raised.value).count("\n") == 0


@pytest.mark.parametrize("inside", ["notebooks/out", "data/out", "labkit"])
def test_a_bundle_does_not_go_into_what_it_is_made_from(inside):
    with pytest.raises(UserError, match="which the bundle is made from"):
        write(FEW, ROOT / inside, replace=True)
    assert not (ROOT / "notebooks" / "out").exists()


@pytest.mark.parametrize("error, seen", [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize("fails", ["write_bytes", "rename"])
def test_an_interrupted_release_leaves_what_was_there(fails, error, seen, tmp_path, monkeypatch):
    write(FEW, tmp_path / "out", also_zip=True)
    before, calls, really = contents(tmp_path), [], getattr(Path, fails)

    def fail(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return really(self, *arguments)

    monkeypatch.setattr(Path, fails, fail)
    with pytest.raises(seen):
        write(OTHERS, tmp_path / "out", replace=True, also_zip=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_the_command_writes_a_bundle_and_says_what_is_in_it(tmp_path, capsys, monkeypatch, assignment):
    monkeypatch.setattr(releasing, "DATA_PARTS", ("claims.json",))
    arguments = dict(out=tmp_path / "course", assignment=None, also=[], zip=True, force=False)
    assert release_command(type("Arguments", (), arguments)) == 0
    said = capsys.readouterr().out
    assert f"release {assignment.release}" in said and str(tmp_path / "course.zip") in said
    total = sum(exercise.points for _, exercise in assignment.exercises) + sum(question.points for question in assignment.questions)
    assert re.search(rf"^all +{len(assignment.exercises)} +{len(assignment.questions)} +{total:g}$", said, re.MULTILINE)
    assert [re.search(rf"^{stem} ", said, re.MULTILINE) is not None for stem in STEMS] == [True] * len(STEMS)


def test_a_notebook_of_another_release_is_recognised(assignment):
    ours = {"metadata": {"labkit": {"release": assignment.release, "assignment": assignment.name}}}
    assert from_another_release(ours, assignment) == ""
    theirs = {"metadata": {"labkit": {"release": "0123456789ab", "assignment": "spring"}}}
    said = from_another_release(theirs, assignment)
    assert "release 0123456789ab of spring" in said and assignment.release in said and said.endswith(".")


@pytest.mark.parametrize("metadata", [None, [], {}, {"labkit": 3}, {"labkit": {}}, {"labkit": {"release": ["a"]}}, {"labkit": {"release": ""}}])
def test_a_notebook_that_does_not_say_where_it_comes_from_is_not_accused(metadata, assignment):
    assert from_another_release({"metadata": metadata}, assignment) == from_another_release({}, assignment) == ""


def test_what_a_notebook_says_of_itself_is_short_and_printable(assignment):
    metadata = {"labkit": {"release": "\x1b[31m" + "x" * 10_000, "assignment": "a\nb\u202e"}}
    said = from_another_release({"metadata": metadata}, assignment)
    assert said.isprintable() and len(said) < 400


def test_a_solution_s_regions_are_found_with_all_their_statements():
    for id, parts in all_solutions().items():
        assert parts and all(part and steps(part) for part in parts), id
    assert len(list(blocks(ast.parse("if x:\n    a = 1\nelse:\n    b = 2\n")))) == 3
    assert without_solutions({"metadata": {"labkit": {"release": "x"}}, "cells": [{"source": "### BEGIN SOLUTION"}]})["cells"][0]["source"]
