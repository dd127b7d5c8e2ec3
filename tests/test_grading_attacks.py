"""Every attack of tests/attacks gets what it is after from a grader that judges in the student's own process, and nothing from ours.

The judges are what stands on the disk, in the table of processes and in the feedback afterwards, and an honest submission right after.
"""

import csv
import io
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest

from labkit.exercises.exercise import exercises_of
from labkit.exercises.judging import AnswerKey
from labkit.grading import isolation
from labkit.grading.exports import write_grades
from labkit.grading.feedback import feedback_page
from labkit.grading.isolation import CALLS_AND_FILES, NAMESPACES, NONE
from labkit.grading.results import Graded, Late
from labkit.grading.sandbox import IsolatedWorker, Zygote, ZygoteLost, chosen_isolation
from labkit.grading.zygote import remove_folder
from labkit.paths import ROOT
from labkit.processes import course_environment
from labkit.submission.apart import Limits, examine
from labkit.submission.cells import cells_of
from tests.attacks import FAMILIES
from tests.attacks.attack import (
    AIMS,
    ENDLESS,
    FILES,
    HUSH,
    LEFT,
    LESSON,
    LOST,
    OPEN,
    POINTS,
    RAW,
    REACHED,
    SECRET,
    STOPPED,
    TOKEN,
    TOKEN_VARIABLE,
    TOLD,
    make_course,
    solved,
    state_of,
)  # fmt: skip

EXERCISES = exercises_of(LESSON)
ALL = [pytest.param(attack, id=f"{family.replace(' ', '-')}-{attack}") for family, attacks in FAMILIES.items() for attack in attacks]
# What namespaces hold back, other layers have to hold back where there are none.
WITHOUT_NAMESPACES = [param for param in ALL if param.id.startswith(("files", "processes", "network", "resources", "introspection"))]
MIB = 2**20
# Short for what goes on for ever; a worker that is as slow as the machine is loaded gets more.
SHORT = Limits(setup_seconds=4, cell_seconds=2, case_seconds=2, memory_mib=768, notebook_seconds=12)
PATIENT = Limits(setup_seconds=60, cell_seconds=30, case_seconds=30, memory_mib=1024, notebook_seconds=120)
GRADER_MIB = 1536  # what judging one hostile submission may take in the grader
FLOOD = 2_000  # letters that nobody reads in one sentence
NAIVE_SECONDS, NAIVE_PATIENCE = 2.0, 30.0
FORMULAS = ("=", "+", "-", "@", "\t", "\r")



@pytest.fixture(scope="module")
def port():
    """Where a server on this machine waits for whoever should not be there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


@pytest.fixture
def instructors(tmp_path):
    """The instructor's folder."""
    return make_course(tmp_path / "course")


def told(words):
    return any(word in words for word in HUSH)


def acts(page, table, rows):
    """Whether a page or a table does more than to be read.   rows: as many as were written."""
    csv.field_size_limit(2**30)
    found = list(csv.reader(io.StringIO(table.lstrip("\ufeff"))))
    lines = table.count("\n")
    tags = any(tag in page for tag in ("<script>fetch", "<script>document", "<script>alert", "<img"))
    return tags or len(found) != rows or lines != rows or any(field.startswith(FORMULAS) for row in found for field in row)


def unreadable(words):
    return len(words) > FLOOD or not all(letter.isprintable() for letter in words)


def marked(mark, besides=()):
    """Processes in whose environment the mark stands, besides those."""
    found = []
    for process in psutil.process_iter():
        try:
            if process not in besides and any(mark in value for value in process.environ().values()) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_corpus_is_large_and_every_family_and_aim_is_in_it():
    attacks = [attack for family in FAMILIES.values() for attack in family]
    assert len(attacks) >= 40 and len({attack.name for attack in attacks}) == len(attacks)
    assert {attack.aim for attack in attacks} == set(AIMS)
    assert all(len(family) >= 4 for family in FAMILIES.values())
    assert all(set(attack.cells) <= {exercise.id for exercise in EXERCISES} for attack in attacks)



class Naive:
    """tests/attacks/naive.py, running."""

    def __init__(self, home):
        self.home = home
        environment = course_environment() | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "HOME": str(home), TOKEN_VARIABLE: TOKEN}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.attacks.naive"], cwd=ROOT, env=environment, text=True, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the naive grader did not start"

    def grade(self, notebook, folder, seconds, students=("mallory", "ann")):
        """Grade this notebook and then an honest one, or those of them that are named.

        Returns whether that ended within the time, and the folder of results.
        """
        out, work = folder / "out", folder / "work"
        out.mkdir()
        work.mkdir()
        for name, content in (("mallory", notebook), ("ann", solved())):
            (out / f"{name}.ipynb").write_text(json.dumps(content))
        print(json.dumps({"folder": str(work), "out": str(out), "seconds": seconds, "students": students}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())["ended"], out

    def left(self):
        """Processes of earlier submissions."""
        return marked(str(self.home), besides=[psutil.Process(self.process.pid)])

    def close(self):
        """End it with all that is left of its submissions."""
        for process in [*self.left(), self.process]:
            try:
                process.kill()
            except psutil.Error:
                pass
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("the naive grader forks and the attacks are Linux's")
    naive = Naive(tmp_path_factory.mktemp("naive"))
    yield naive
    naive.close()


def seen_in_one_process(attack, naive, course, port, folder):
    """What becomes of an attack and of the submission after it where student's code and check share a process."""
    before = state_of(course)
    students, seconds = ("mallory", "ann") if attack.aim == STOPPED else ("mallory",), NAIVE_SECONDS if attack.aim == ENDLESS else NAIVE_PATIENCE
    ended, out = naive.grade(attack.notebook(course, port), folder, seconds, students)
    left, seen = naive.left(), set()
    for process in left:
        process.kill()
    mallory, last = ((json.loads(path.read_text()) if path.exists() else None) for path in (out / "mallory.json", out / f"{students[-1]}.json"))
    points = mallory["points"] if mallory else {}
    words = "".join(mallory["feedback"].values()) if mallory else ""
    # The naive grader's own processes are among those that are left when it had to be stopped, or was killed.
    seen |= {LEFT} if left and ended and last else set()
    seen |= {FILES} if state_of(course) != before else set()
    seen |= {ENDLESS} if not ended else set()
    seen |= {STOPPED} if ended and "ann" in students and last is None else set()
    seen |= {LOST} if ended and any(points.get(exercise.id, 0) < exercise.points for exercise in attack.honest) else set()
    seen |= {POINTS} if sum(points.values()) > sum(e.points for e in attack.honest) or any(points.get(id) for id in attack.cells) else set()
    seen |= {TOLD} if told(words) else set()
    seen |= {REACHED} if OPEN in words else set()
    if mallory and last:
        printed = int((out / "mallory.size").read_text())
        raw = acts((out / "mallory.html").read_text(), (out / "grades.csv").read_text(), len(students)) or unreadable(words) or printed > 10 * MIB
        seen |= {RAW} if raw else set()
    remove_folder(str(folder / "work"))  # it may be deeper than pytest can clear away
    return seen, words


@pytest.mark.parametrize("attack", ALL)
def test_an_attack_works_where_code_and_check_share_a_process(attack, naive, instructors, port, tmp_path):
    seen, words = seen_in_one_process(attack, naive, instructors, port, tmp_path)
    assert attack.aim in seen, f"only {seen or 'nothing'} was seen: {words[:300]}"


def test_an_honest_submission_earns_all_points_there(naive, tmp_path):
    ended, out = naive.grade(solved(), tmp_path, NAIVE_PATIENCE)
    assert ended and not naive.left()
    for name in ("mallory", "ann"):
        assert sum(json.loads((out / f"{name}.json").read_text())["points"].values()) == 15



@cache
def key_of(exercise):
    return AnswerKey(exercise, SECRET, hidden=True)


def zygote_of(tier, folder):
    """A zygote of this tier, in a folder of temporary files of its own."""
    found = isolation.probe()
    if isolation.TIERS.index(found.tier) > isolation.TIERS.index(tier):
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in found.layers.items() if reason)
        pytest.skip(f"the tier {tier!r} does not work here ({reasons})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        setup = cells_of(solved(), []).setup
        with Zygote(chosen_isolation(tier), [setup]) as zygote:
            yield Ours(zygote)
    wait_until(lambda: not marked(str(folder)))
    assert not list(folder.iterdir()), "the zygote's folder is left"


class Ours:
    """Our grader in one tier.   zygote: is made anew where an attack has ended it, so that the next test says something, too."""

    def __init__(self, zygote):
        self.zygote, self.beginning = zygote, None
        self.beginning = self.processes()

    def processes(self):
        """All that runs in or below the zygote."""
        return set(marked(self.zygote.folder)) | set(psutil.Process(self.zygote.process.pid).children(recursive=True))

    def examine(self, notebook, limits):
        """The verdicts on a notebook."""
        cells = cells_of(notebook, [exercise.id for exercise in EXERCISES])
        return examine(cells, EXERCISES, limits, key_of=key_of, new_worker=lambda limits: IsolatedWorker(limits, self.zygote))

    def start_again(self):
        """A fresh zygote in the place of one that is lost."""
        self.zygote.__exit__()
        self.zygote.__enter__()
        self.beginning = self.processes()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    yield from zygote_of(NAMESPACES, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def ours_without_namespaces(tmp_path_factory):
    yield from zygote_of(CALLS_AND_FILES, tmp_path_factory.mktemp("weaker"))


def wait_until(happened, seconds=20):
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.01)
    return happened()


@contextmanager
def no_more_memory_than(mib):
    """This process cannot take more than so much on top of what it has: what is too much is an error and not the machine's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + mib * MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def seen_in_ours(attack, ours, course, port, folder):
    """The same of our grader, with the words of its feedback."""
    notebook, before, begun, seen, verdicts = attack.notebook(course, port), state_of(course), time.monotonic(), set(), []
    try:
        with no_more_memory_than(GRADER_MIB):
            verdicts = ours.examine(notebook, SHORT)
    except (Exception, MemoryError) as error:  # whatever breaks off the grading of this submission
        seen.add(LOST)
        words = f"the grader: {type(error).__name__}: {error}"
    else:
        words = "\n".join(verdict.sentence for verdict in verdicts)
        seen |= {RAW} if any(unreadable(verdict.sentence) for verdict in verdicts) or acts(*shown(verdicts, folder), 2) else set()
    seen |= {ENDLESS} if time.monotonic() - begun > SHORT.notebook_seconds + 5 else set()
    correct = {verdict.exercise: verdict.earned for verdict in verdicts}
    most = {exercise.id: exercise.points for exercise in attack.honest}
    seen |= {POINTS} if sum(correct.values()) > sum(most.values()) or any(correct.get(id) for id in attack.cells) else set()
    seen |= {LOST} if any(correct.get(id) != points for id, points in most.items() if id not in attack.spoils) else set()
    seen |= {TOLD} if told(words) else set()
    seen |= {REACHED} if OPEN in words else set()
    try:
        if [verdict.earned for verdict in ours.examine(solved(), PATIENT)] != [exercise.points for exercise in EXERCISES]:
            seen.add(STOPPED)
    except ZygoteLost:
        seen.add(STOPPED)
        ours.start_again()
    seen |= {FILES} if state_of(course) != before else set()
    if not wait_until(lambda: ours.processes() <= ours.beginning):
        seen.add(LEFT)
    return seen, words


def shown(verdicts, folder):
    """The page that the student gets, and the table that the instructor gets."""
    graded = Graded("mallory", "lora", "r1", NONE, "", (), (), "", (), tuple(verdicts), {v.exercise: LESSON for v in verdicts}, (), None, Late())
    return feedback_page(graded), write_grades(folder, [graded]).read_text(encoding="utf-8")


def assert_nothing_was_gained(attack, ours, course, port, folder):
    seen, words = seen_in_ours(attack, ours, course, port, folder)
    assert not seen, f"{seen}: {words[:1000]}"


@pytest.mark.parametrize("attack", ALL)
def test_an_attack_gains_nothing(attack, ours, instructors, port, tmp_path):
    assert_nothing_was_gained(attack, ours, instructors, port, tmp_path)


@pytest.mark.parametrize("attack", WITHOUT_NAMESPACES)
def test_an_attack_gains_nothing_without_namespaces(attack, ours_without_namespaces, instructors, port, tmp_path):
    assert_nothing_was_gained(attack, ours_without_namespaces, instructors, port, tmp_path)


def test_an_honest_submission_earns_all_points(ours):
    assert [verdict.earned for verdict in ours.examine(solved(), PATIENT)] == [5, 3, 3, 4]
    assert wait_until(lambda: ours.processes() <= ours.beginning)
