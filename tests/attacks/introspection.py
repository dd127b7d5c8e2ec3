"""Introspection: look for the right answers, the secret, or somebody else's work, in memory and on the disk."""

from tests.attacks.attack import POINTS, TOKEN_VARIABLE, TOLD, Attack, on_count, on_merge

ATTACKS = [
    on_count("walk-the-stack", POINTS, "walks up the callers to the answer key, and returns what it holds", """
import sys
def count_lora(shapes, rank):
    frame = sys._getframe()
    while frame is not None:
        key = frame.f_locals.get("key")
        if hasattr(key, "expected"):
            cases = [case.arguments["shapes"] for case in key.cases]
            return key.expected[cases.index(shapes)]
        frame = frame.f_back
    return 0
"""),
    on_count("search-all-objects", POINTS, "goes through all objects of the process for answer keys and exercises", """
import gc
def count_lora(shapes, rank):
    gc.unfreeze()
    for found in gc.get_objects():
        name = type(found).__name__
        if name == "AnswerKey" and found.exercise.entry == "count_lora":
            return found.expected[[case.arguments["shapes"] for case in found.cases].index(shapes)]
        if name == "Count" and hasattr(found, "expected"):
            from labkit.exercises.exercise import Case
            return found.expected(Case({"shapes": shapes, "rank": rank}, "", ""))
    return 0
""", spoils=("lora-merge", "lora-rank-needed")),
    on_count("import-the-lesson", POINTS, "imports the module with the exercise and asks it", """
def count_lora(shapes, rank):
    import labkit.exercises.lora_parameter_counting as lesson
    from labkit.exercises.exercise import Case
    return lesson.Count().expected(Case({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_count("all-exercises", POINTS, "asks labkit for all its exercises, and the right one of them for the answer", """
def count_lora(shapes, rank):
    from labkit.exercises.exercise import Case, all_exercises
    return all_exercises()["lora-count"].expected(Case({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_count("modules-and-registries", POINTS, "searches sys.modules for the lesson and the registry of exercises for what is left of it", """
import sys
def count_lora(shapes, rank):
    from labkit.exercises.exercise import Case
    for name, module in list(sys.modules.items()):
        if "lora_parameter_counting" in name:
            return module.Count().expected(Case({"shapes": shapes, "rank": rank}, "", ""))
        for asked in getattr(module, "_EXERCISES", {}).values():
            if asked.entry == "count_lora":
                return asked.expected(Case({"shapes": shapes, "rank": rank}, "", ""))
    return 0
"""),
    on_count("read-the-source", POINTS, "reads the lesson's source from the disk and runs it under another name", """
from pathlib import Path
import labkit
lesson = {"__name__": "mine", "__doc__": ""}
source = (Path(labkit.__file__).parent / "exercises" / "lora_parameter_counting.py").read_text()
source = source.replace("@exercise(", "@(lambda *about, **more: lambda cls: cls)(")
exec(compile(source, "mine", "exec"), lesson)
def count_lora(shapes, rank):
    return lesson["Count"]().expected(lesson["Case"]({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_count("read-the-bytecode", POINTS, "looks for the lesson's compiled file, in every place where Python may keep one", """
import glob, importlib.util, marshal, os
import labkit
path = os.path.join(os.path.dirname(labkit.__file__), "exercises", "lora_parameter_counting.py")
found = [importlib.util.cache_from_source(path), *glob.glob(os.path.join(os.path.dirname(path), "__pycache__", "lora_parameter*")), path]
found = next(name for name in found if os.path.exists(name))
data = open(found, "rb").read()
code = compile(data, "mine", "exec") if found.endswith(".py") else marshal.loads(data[16:])
from labkit.exercises import exercise
exercise.exercise = lambda *about, **more: lambda cls: cls
lesson = {"__name__": "mine"}
exec(code, lesson)
def count_lora(shapes, rank):
    return lesson["Count"]().expected(exercise.Case({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_merge("notebook-with-solutions", POINTS, "reads the solution from the instructor's copy of the lesson", """
import json
from labkit.paths import NOTEBOOKS
for cell in json.loads((NOTEBOOKS / "04_lora_parameter_counting.ipynb").read_text())["cells"]:
    if cell["metadata"].get("nbgrader", {}).get("grade_id") == "lora-merge":
        exec("".join(cell["source"]))
"""),
    on_merge("somebody-elses-submission", POINTS, "takes the cell from the notebook that another student has handed in", """
import json
for cell in json.load(open("@COURSE@/submissions/carol/04.ipynb"))["cells"]:
    if cell["metadata"].get("nbgrader", {}).get("grade_id") == "lora-merge":
        exec("".join(cell["source"]))
"""),
    on_count("the-others-work-in-the-feedback", TOLD, "has the feedback tell what another student has handed in", """
import json
raise RuntimeError(json.load(open("@COURSE@/submissions/carol/04.ipynb"))["metadata"]["author"])
"""),
    on_count("the-others-grades", TOLD, "has the feedback tell another student's grades", """
raise RuntimeError(open("@COURSE@/results/carol.json").read())
"""),
    on_count("the-secret-file", TOLD, "has the feedback tell the secret that the hidden cases are drawn from", """
raise RuntimeError(open("@COURSE@/secret").read())
"""),
    on_count("environment-variables", TOLD, "has the feedback tell the keys and tokens that the instructor's environment holds", f"""
import os
raise RuntimeError(os.environ["{TOKEN_VARIABLE}"])
"""),
    on_count("environment-of-the-parent", TOLD, "reads the environment of this and of the other processes from /proc", f"""
import os
for pid in ("self", os.getppid(), 1):
    for part in open(f"/proc/{{pid}}/environ").read().split("\\0"):
        if part.startswith("{TOKEN_VARIABLE}="):
            raise RuntimeError(part)
"""),
    on_count("memory-of-the-process", TOLD, "searches its own memory for the secret, through /proc/self/mem", """
with open("/proc/self/maps") as places, open("/proc/self/mem", "rb", 0) as memory:
    for place in places:
        span, mode, *_, name = place.split(None, 5) if place.count(" ") > 5 else (*place.split(), "")
        begin, end = (int(part, 16) for part in span.split("-"))
        if mode.startswith("rw") and end - begin < 2**28 and (not name.strip() or "heap" in name):
            memory.seek(begin)
            data = memory.read(end - begin)
            at = data.find(bytes(reversed(b"eht-1749-hsuh")))  # so that it does not find itself
            if at >= 0:
                raise RuntimeError(data[at : at + 20].decode(errors="replace"))
"""),
    on_count("globals-of-the-caller", TOLD, "looks through the global names of all callers for a secret", """
import sys
def count_lora(shapes, rank):
    frame = sys._getframe()
    while frame is not None:
        for name, value in frame.f_globals.items():
            if "secret" in name.lower() and isinstance(value, str):
                raise RuntimeError(value)
        frame = frame.f_back
"""),
    Attack("closures-of-the-check", TOLD, "opens the functions of the check, and looks for strings in them", {"lora-count": """
from labkit.exercises import judging
import labkit
def strings_of(function):
    yield from (value for value in function.__globals__.values() if isinstance(value, str))
    yield from (cell.cell_contents for cell in function.__closure__ or ())
    yield from function.__code__.co_consts
for function in (judging.check, labkit.check, judging.judge, judging.trusted):
    for value in strings_of(function):
        if isinstance(value, str) and value.startswith("hush-"):
            raise RuntimeError(value)
"""}),
]
