"""Serialisation: what carries answers from the student's process to the grader's. Pickles run code; every other format can lie about itself.

A kernel's result is the file result.pickle; a worker answers on a pipe, in messages of labkit/submission/wire.py. These attacks write both.
"""

from tests.attacks.attack import LOST, POINTS, RAW, STOPPED, WRONG, Attack, on_count

# Messages as the wire has them, made without it, and written to whatever is open.
_FORGE = """
import json, os, pickle, struct
EMPTY_ONE = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
EMPTY = struct.pack("<Q", 2) + b"{}"
def message(value, tensors=EMPTY):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack(">QQ", len(text), len(tensors)) + text + tensors
def answered(value, tensors=EMPTY):
    return message({"dict": {"answer": value}}, tensors)
def tensors_of(header, data=b""):
    header = json.dumps(header).encode() if isinstance(header, dict) else b"{" + header.encode() + b"}"
    return struct.pack("<Q", len(header)) + header + data
def send(data):
    for descriptor in range(3, 32):
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(descriptor, left):]
        except OSError:
            pass
def result(data):
    with open("result.pickle", "wb") as file:
        file.write(data)
FULL = pickle.dumps({"points": {"lora-layer": 5, "lora-count": 3, "lora-merge": 3, "lora-rank-needed": 4}, "feedback": {}})
"""


def _asked(name, aim, tries, forged, **more):
    """Instead of an answer, `forged` is sent (an expression), and a result that is none is left behind."""
    return on_count(name, aim, tries, _FORGE + f"""
def count_lora(shapes, rank):
    result(b"no pickle")
    send({forged})
    os._exit(0)
""", **more)


ATTACKS = [
    on_count("pickle-that-runs", STOPPED, "has the grader run a function when it reads the answers", """
import os
class Answer:
    def __reduce__(self):
        return os._exit, (0,)
ANSWER = Answer()
""" + WRONG["lora-count"]),
    on_count("answer-that-reduces", STOPPED, "returns an object that, pickled, runs a function in whoever reads it", """
import os
class Answer(dict):
    def __reduce__(self):
        return os.system, ("kill -9 $PPID",)
    def __deepcopy__(self, memory):
        return os._exit(0)
def count_lora(shapes, rank):
    global ANSWER
    ANSWER = Answer()
    return ANSWER
"""),
    on_count("torch-file", STOPPED, "leaves a result that only looks like one, and runs code in whoever loads it", """
import os, pickle
class Loaded:
    def __reduce__(self):
        return exec, ("import os; os._exit(0)",)
with open("result.pickle", "wb") as file:
    pickle.dump(Loaded(), file)
os._exit(0)
"""),
    on_count("forged-results", POINTS, "writes the result itself, on every open descriptor and into the file, and ends", _FORGE + """
result(FULL)
send(message({"dict": {"raised": None}}) + answered(True) * 40)
os._exit(0)
"""),
    on_count("answers-in-advance", POINTS, "answers, from a thread, whatever will be asked: correct", _FORGE + """
import threading, time
def count_lora(shapes, rank):
    result(FULL)
    right = {"dict": {"raised": None, "answer": {"dict": {"status": "correct", "earned": 3}}, "status": "correct", "earned": 3}}
    for _ in range(20):
        send(message(right))
        time.sleep(0.01)
    os._exit(0)
""", spoils=("lora-merge", "lora-rank-needed")),
    on_count("verdict-as-an-answer", POINTS, "answers with a verdict, and with an error that may be due", _FORGE + """
def count_lora(shapes, rank):
    result(FULL)
    send(message({"dict": {"raised": {"dict": {"kind": "NotImplementedError", "message": "", "line": True}}, "status": "correct", "points": 3}}))
    os._exit(0)
"""),
    _asked("header-of-all-ones", LOST, "announces a message of 2 to the power of 64 bytes", 'b"\\xff" * 64'),
    _asked("header-and-nothing", LOST, "announces 64 MiB and sends three bytes", 'struct.pack(">QQ", 10, 2**26) + b"{}}"'),
    _asked("not-json", LOST, "sends what is no JSON, in no encoding", 'message(b"\\xff\\xfe\\x00{" * 100)'),
    _asked("json-without-a-bottom", LOST, "sends a million brackets", 'message(b"[" * 1_000_000)'),
    _asked("json-of-numbers", LOST, "sends two million numbers as one answer",
           "message(b'{\"dict\":{\"answer\":[' + b'0,' * 1_900_000 + b'0]}}')"),
    _asked("json-of-lists", LOST, "sends a million empty lists as one answer",
           "message(b'{\"dict\":{\"answer\":[' + b'[],' * 1_300_000 + b'[]]}}')"),
    _asked("json-that-is-no-answer", LOST, "sends a number where an object is due, and objects with two keys",
           'message(3) + message({"dict": {"answer": {"tensor": "0", "tuple": []}}})'),
    _asked("tensors-that-overlap", LOST, "sends a safetensors header whose tensors lie outside of its data and over each other",
           'answered({"tensor": "0"}, tensors_of({"0": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
           '"1": {"dtype": "F32", "shape": [4], "data_offsets": [8, 2**40]}}))'),
    _asked("tensor-of-a-strange-shape", LOST, "sends an empty tensor with more columns than numpy can count",
           'answered({"tensor": "0"}, tensors_of({"0": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}))'),
    _asked("one-tensor-many-times", LOST, "sends 1 MiB, and an answer in which it stands a hundred thousand times",
           'answered([{"tensor": "0"}] * 100_000, tensors_of({"0": {"dtype": "U8", "shape": [2**20], "data_offsets": [0, 2**20]}}, bytes(2**20)))'),
    _asked("a-million-tensors", LOST, "sends a million tensors without a value",
           'answered(1, tensors_of(",".join(f\'"{n}":\' + EMPTY_ONE for n in range(900_000))))'),
    _asked("tensor-of-bytes", LOST, "sends 64 MiB of bytes, which are 512 MiB of float64",
           'answered({"tensor": "0"}, tensors_of({"0": {"dtype": "U8", "shape": [2**26], "data_offsets": [0, 2**26]}}, bytes(2**26)))'),
    _asked("a-long-name", LOST, "sends a dict with a key of four million letters",
           'message(b\'{"dict":{"answer":{"dict":{"\' + b"x" * 4_000_000 + b\'":0}}}}\')'),
    Attack("names-that-flood", RAW, "answers with 100,000 names, which the feedback would list", {"lora-layer": """
class LoRALinear(torch.nn.Module):
    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.A = torch.nn.Parameter(torch.randn(rank, weight.shape[1]))
        self.B = torch.nn.Parameter(torch.zeros(len(weight), rank))
        self.scaling = alpha / rank
    def forward(self, x):
        return x @ self.weight.T + self.scaling * (x @ self.A.T @ self.B.T)
    def named_parameters(self, *more, **other):
        yield from super().named_parameters(*more, **other)
        for number in range(90_000):
            yield f"a_very_long_name_{number}", self.A
print("a_very_long_name" * 1_000_000)
"""}),
]
