"""Shadowing: be found in the place of a module. Withheld modules that a student has on the disk anyway are no secret; those here are."""

from tests.attacks.attack import POINTS, WRONG, Attack, on_count, on_merge

_WITH_PEFT = """
def merged(weight, A, B, alpha):
    peft = found_peft()
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer = peft.tuners.lora.Linear(base, "default", peft.LoraConfig(r=len(A), lora_alpha=alpha), r=len(A), lora_alpha=alpha)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    return weight + layer.get_delta_weight("default")
"""

ATTACKS = [
    on_count("another-judge", POINTS, "puts a module of its own in the place of the one that judges", f"""
import sys, types
from labkit.exercises import judging
mine = types.ModuleType("labkit.exercises.judging")
vars(mine).update(vars(judging))
def judge(exercise, *more, **other):
    return judging.Verdict(exercise.id, "correct", "", 1, 1, exercise.points)
mine.judge = judging.judge = judge
sys.modules["labkit.exercises.judging"] = mine
{WRONG["lora-count"]}"""),
    on_count("hook-on-imports", POINTS, "answers the question where a module lies with a module of its own", f"""
import importlib.abc, importlib.machinery, sys
class Mine(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in ("tomllib", "safetensors", "numpy") else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        def loads(text):
            sys._getframe(1).f_locals["points"].update({{"lora-count": 3}})
            return {{"name": "lora"}}
        module.loads = loads
sys.meta_path.insert(0, Mine())
{WRONG["lora-count"]}"""),
    on_count("import-itself", POINTS, "replaces Python's import", f"""
import builtins, sys, types
plain = builtins.__import__
def mine(name, *more):
    if name == "tomllib":
        def loads(text):
            sys._getframe(1).f_locals["points"].update({{"lora-count": 3}})
            return {{"name": "lora"}}
        return types.SimpleNamespace(loads=loads)
    return plain(name, *more)
builtins.__import__ = mine
{WRONG["lora-count"]}"""),
    on_count("lesson-under-another-name", POINTS, "loads the lesson's file as a module called innocent", """
import importlib.util, os, sys
import labkit
def count_lora(shapes, rank):
    from labkit.exercises import exercise
    exercise.exercise = lambda *about, **more: lambda cls: cls
    path = os.path.join(os.path.dirname(labkit.__file__), "exercises", "lora_parameter_counting.py")
    spec = importlib.util.spec_from_file_location("innocent", path)
    innocent = sys.modules["innocent"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(innocent)
    return innocent.Count().expected(exercise.Case({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_count("lesson-without-the-guard", POINTS, "takes away what guards imports, and imports the lesson", """
import sys
def count_lora(shapes, rank):
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Withheld" not in type(finder).__name__]
    import labkit.exercises.lora_parameter_counting as lesson
    from labkit.exercises.exercise import Case
    return lesson.Count().expected(Case({"shapes": shapes, "rank": rank}, "", ""))
"""),
    on_merge("library-without-the-guard", POINTS, "takes away what guards imports, and has the library that is the answer compute it", """
import sys
def found_peft():
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Withheld" not in type(finder).__name__]
    import peft
    return peft
""" + _WITH_PEFT),
    Attack("library-in-a-box", POINTS, "imports the library in the set-up cell, where nothing is withheld, and keeps all its modules", {
        "lora-merge": """
import sys
def found_peft():
    sys.modules.update(BOX)
    return BOX["peft"]
""" + _WITH_PEFT}, setup="""
try:
    import sys
    import peft
    BOX = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "peft"}
except ImportError:
    BOX = {}
"""),
    on_merge("library-by-its-classes", POINTS, "finds the library by way of the classes below torch's, which know all that are made from them", """
import gc, sys
def found_peft():
    def below(cls):
        for found in cls.__subclasses__():
            yield found
            yield from below(found)
    linear = next(cls for cls in below(torch.nn.Module) if (cls.__module__, cls.__name__) == ("peft.tuners.lora.layer", "Linear"))
    gc.unfreeze()
    for found in gc.get_objects():
        if type(found) is type(sys) and found.__name__.split(".")[0] == "peft":
            sys.modules[found.__name__] = found
    assert linear.__module__ in sys.modules
    return sys.modules["peft"]
""" + _WITH_PEFT),
]
