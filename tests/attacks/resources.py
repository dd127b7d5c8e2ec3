"""Resources: take more time or memory than there is, in the student's process or, by what comes back from it, in the grader's."""

from tests.attacks.attack import ENDLESS, LOST, OPEN, RAW, REACHED, STOPPED, WRONG, Attack, on_count, on_merge

ATTACKS = [
    on_count("loop", ENDLESS, "goes round for ever when it is asked", """
def count_lora(shapes, rank):
    while True:
        pass
"""),
    on_count("loop-in-c", ENDLESS, "computes a number without end, in a place that no signal handler of Python's gets to", """
def count_lora(shapes, rank):
    return 9**9**9
"""),
    Attack("sleep-in-the-set-up", ENDLESS, "sleeps in the set-up cell", setup="import time\ntime.sleep(60)\n",
           spoils=("lora-layer", "lora-count", "lora-merge", "lora-rank-needed")),
    on_count("sleep-at-the-end", ENDLESS, "sleeps when the process is about to end", f"""
import atexit, time
atexit.register(time.sleep, 60)
{WRONG["lora-count"]}"""),
    on_count("sleep-when-forgotten", ENDLESS, "sleeps when its answer is thrown away", """
import time
class Answer:
    def __del__(self):
        time.sleep(60)
def count_lora(shapes, rank):
    return Answer()
"""),
    on_count("sleep-when-shown", ENDLESS, "sleeps when its answer is shown", """
import time
class Answer:
    def __repr__(self):
        time.sleep(60)
def count_lora(shapes, rank):
    return Answer()
"""),
    on_count("recursion", LOST, "calls itself until the process breaks down", """
import sys, threading
def count_lora(shapes, rank):
    sys.setrecursionlimit(10**9)
    class Deep:
        def __repr__(self):
            return repr(self)
        def __getattr__(self, name):
            return getattr(self, name)
    return Deep().anything
"""),
    on_count("segmentation-fault", LOST, "reads where there is no memory", """
def count_lora(shapes, rank):
    import ctypes
    return ctypes.string_at(0)
"""),
    on_count("memory", REACHED, "takes memory until there is none (1 GiB here)", f"""
taken = [bytearray(b"x") * (100 * 2**20) for _ in range(10)]
raise RuntimeError("{OPEN}: 1 GiB")
"""),
    on_count("memory-by-tensors", REACHED, "takes memory for tensors (1 GiB here)", f"""
import torch
taken = torch.ones(10, 100 * 2**20, dtype=torch.uint8)
raise RuntimeError("{OPEN}: 1 GiB")
"""),
    on_merge("huge-tensor", REACHED, "returns a matrix larger than any in the course (128 MiB here), and says so when it was taken", f"""
def merged(weight, A, B, alpha):
    if hasattr(merged, "taken"):
        raise RuntimeError("{OPEN}: 128 MiB were taken as an answer")
    merged.taken = True
    return torch.zeros(2**25)
"""),
    on_count("a-million-numbers", ENDLESS, "returns lists of lists of numbers, over which a comparison takes minutes", """
def count_lora(shapes, rank):
    return [[0] * 90_000 for _ in range(20)]
"""),
    on_count("output-without-end", RAW, "prints more than anybody can keep (60 MiB here)", f"""
for _ in range(60):
    print("x" * 2**20)
{WRONG["lora-count"]}"""),
    on_count("errors-without-end", ENDLESS, "writes to the error output for ever", """
import os
while True:
    os.write(2, b"an error\\n")
""", ),
    Attack("a-source-of-five-megabytes", STOPPED, "hands in a cell that is larger than anything that is sent, and stops who does not expect it", {
        "lora-count": "import os\nos.kill(os.getppid(), 9)\n#" + "x" * 5_000_000}),
    Attack("a-source-of-long-letters", STOPPED, "hands in a cell whose letters take more bytes than its length says", {
        "lora-count": "import os\nos.kill(os.getppid(), 9)\n#" + "\U0001f916" * 900_000}),
]
