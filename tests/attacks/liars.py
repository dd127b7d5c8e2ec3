"""Liars: answers that are no values but objects with a will of their own, which become right when somebody looks at them."""

from tests.attacks.attack import POINTS, WRONG, Attack, on_count, on_merge

# Whoever is asked for a value looks up through the callers for a variable called `expected`.
_LOOK_UP = """
import sys
def expected_above():
    frame = sys._getframe()
    while frame is not None:
        if "expected" in frame.f_locals and "given" in frame.f_locals:
            return frame.f_locals["expected"]
        frame = frame.f_back
"""

ATTACKS = [
    on_count("number-that-becomes-right", POINTS, "returns a float that is worked out when it is converted: it is what is expected", _LOOK_UP + """
class Liar(float):
    def __float__(self):
        right = expected_above()
        return 0.0 if right is None else float(right)
def count_lora(shapes, rank):
    return Liar(0)
"""),
    on_count("equal-to-everything", POINTS, "returns an object that equals whatever it is compared with, and a check that is one", """
class Yes(int):
    __eq__ = __le__ = __ge__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__
def count_lora(shapes, rank):
    global check
    check = lambda entry: Yes()
    return Yes()
check = lambda entry: Yes()
"""),
    on_merge("tensor-that-answers-itself", POINTS, "returns a tensor whose __torch_function__ hands out the expected one", _LOOK_UP + """
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        right = expected_above()
        if right is not None and function.__name__ == "detach":
            return right.clone()
        return super().__torch_function__(function, types, arguments, options or {})
def merged(weight, A, B, alpha):
    return torch.zeros_like(weight).as_subclass(Liar)
"""),
    on_merge("list-with-other-items", POINTS, "returns a list that gives out the expected rows whenever somebody goes through it", _LOOK_UP + """
class Liar(list):
    def __iter__(self):
        right = expected_above()
        return super().__iter__() if right is None else iter(right.tolist())
    def __len__(self):
        right = expected_above()
        return 1 if right is None else len(right)
def merged(weight, A, B, alpha):
    return Liar([0.0])
""" + "from labkit.exercises import asking\nasking.plain = lambda value: value\n"),
    on_count("lazy-integer", POINTS, "returns an int whose absolute value, which a check looks at first, patches the comparison", """
class Lazy(int):
    def __abs__(self):
        import numpy
        numpy.isclose = lambda *values, **tolerance: numpy.bool_(True)
        return 0
def count_lora(shapes, rank):
    return Lazy(0)
"""),
    Attack("repr-with-a-side-effect", POINTS, "returns an object that patches the check of the next exercises when its wrong answer is shown", {
        "lora-count": """
class Shown:
    def __repr__(self):
        from labkit.exercises import judging
        judging.difference = lambda *values, **more: ""
        return "nothing"
def count_lora(shapes, rank):
    return Shown()
""", "lora-merge": WRONG["lora-merge"]}),
    Attack("message-with-a-side-effect", POINTS, "raises an exception that patches the check of the next exercises when its message is read", {
        "lora-count": """
class Read(Exception):
    def __str__(self):
        from labkit.exercises import judging
        judging.difference = lambda *values, **more: ""
        return "nothing"
def count_lora(shapes, rank):
    raise Read
""", "lora-merge": WRONG["lora-merge"]}),
    on_merge("module-that-is-a-function", POINTS, "hands over an object with a __call__ that asks the caller's own exercise for the answer", """
import sys
class Merged:
    __name__ = "merged"
    def __call__(self, *arguments):
        frame = sys._getframe()
        while frame is not None:
            if "key" in frame.f_locals and "case" in frame.f_locals:
                break
            if "entry" in frame.f_locals and "case" in frame.f_locals:
                case = frame.f_locals["case"]
            frame = frame.f_back
        from labkit.exercises.exercise import exercises_of
        asked = next(e for e in exercises_of("04_lora_parameter_counting") if e.entry == "merged")
        return asked.expected(case)
merged = Merged()
"""),
]
