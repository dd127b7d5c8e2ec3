"""Files: write where the grader reads, change what is not the student's, fill the disk, or leave something that nobody can remove."""

from tests.attacks.attack import FILES, OPEN, POINTS, REACHED, STOPPED, WRONG, on_count

_RESULT = """
import os, pickle
def full_marks():
    points = {"lora-layer": 5, "lora-count": 3, "lora-merge": 3, "lora-rank-needed": 4}
    with open("result.pickle", "wb") as file:
        pickle.dump({"assignment": "lora", "points": points, "feedback": {}, "answers": {}}, file)
"""

ATTACKS = [
    on_count("write-the-result-at-the-end", POINTS, "overwrites the result when the process ends, after the grader has written it", _RESULT + f"""
import atexit
atexit.register(full_marks)
{WRONG["lora-count"]}"""),
    on_count("overwrite-the-grades", FILES, "gives another student no points", """
open("@COURSE@/results/carol.json", "w").write("{}")
"""),
    on_count("overwrite-the-package", FILES, "changes the check for everybody who is graded afterwards", """
open("@COURSE@/package/check.py", "w").write("def check(entry):\\n    return 3\\n")
"""),
    on_count("remove-a-submission", FILES, "removes what another student has handed in", """
import shutil
shutil.rmtree("@COURSE@/submissions/carol")
"""),
    on_count("start-up-file", FILES, "leaves a sitecustomize.py and a .pth, which every later Python of the instructor runs", """
from pathlib import Path
folder = Path("@COURSE@/home/.local/lib/python3/site-packages")
folder.mkdir(parents=True)
(folder / "sitecustomize.py").write_text("import os")
(folder / "mine.pth").write_text("import os")
"""),
    on_count("link-in-the-way", FILES, "moves the folder of results and puts a link to its own in its place", """
import os
os.rename("@COURSE@/results", "@COURSE@/results-before")
os.symlink(os.getcwd(), "@COURSE@/results")
"""),
    on_count("take-the-rights-away", FILES, "changes only the mode: then the instructor cannot read the results, and everybody the secret", """
import os
os.chmod("@COURSE@/results", 0)
os.chmod("@COURSE@/secret", 0o666)
"""),
    on_count("handed-in-yesterday", FILES, "changes only the time of its own submission, to one before the deadline", """
import os
os.utime("@COURSE@/submissions/mallory/04.ipynb", (1, 1))
"""),
    on_count("cut-to-nothing", FILES, "empties a file without writing to it: by truncate, and by opening it for reading", """
import os
for cut in (lambda name: os.truncate(name, 0), lambda name: os.open(name, os.O_RDONLY | os.O_TRUNC)):
    try:
        cut("@COURSE@/results/carol.json")
    except OSError:
        pass
"""),
    on_count("modules-beside-the-notebook", POINTS, "puts a numpy.py and a tomllib.py where the next import may find them", f"""
shadow = '''
import sys
def loads(text):
    sys._getframe(1).f_locals["points"].update({{"lora-count": 3}})
    return {{"name": "lora"}}
'''
for name in ("tomllib", "numpy", "torch", "labkit", "json", "safetensors"):
    open(name + ".py", "w").write(shadow)
{WRONG["lora-count"]}"""),
    on_count("one-big-file", REACHED, "fills the disk with one file", f"""
with open("big", "wb") as file:
    for _ in range(10):
        file.write(bytes(20 * 2**20))
raise RuntimeError("{OPEN}: 200 MiB in one file")
"""),
    on_count("several-big-files", REACHED, "fills the disk with files, each of which is small enough", f"""
import os, time
for number in range(10):
    with open(f"part{{number}}", "wb") as file:
        file.write(bytes(20 * 2**20))
    time.sleep(0.05)
assert sum(os.stat(name).st_size for name in os.listdir()) > 190 * 2**20
raise RuntimeError("{OPEN}: 200 MiB in ten files")
"""),
    on_count("many-small-files", REACHED, "uses up the file system's entries", f"""
for number in range(12_000):
    open(f"{{number}}", "w").close()
raise RuntimeError("{OPEN}: 12,000 files")
"""),
    on_count("folders-without-a-bottom", STOPPED, "nests folders deeper than shutil.rmtree can go back up", f"""
import os
for _ in range(2_000):
    os.mkdir("d")
    os.chdir("d")
{WRONG["lora-count"]}"""),
    on_count("a-folder-that-nobody-may-open", POINTS, "leaves a result, and a folder that it has closed behind itself", _RESULT + """
full_marks()
os.makedirs("closed/inside")
os.chmod("closed", 0)
os._exit(0)
"""),
    on_count("lease-on-a-file", REACHED, "takes a lease on a file of the library: whoever opens it next waits for up to 45 s", f"""
import fcntl, os
import labkit
for name in ("doctor", "install", "claims", "watch"):
    file = os.open(os.path.join(os.path.dirname(labkit.__file__), name + ".py"), os.O_RDONLY)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:  # somebody else has it open
        continue
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    raise RuntimeError("{OPEN}: " + name)
"""),
]
