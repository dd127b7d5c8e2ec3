"""Makes the environment the course runs in (.venv, from requirements.txt), with the standard library alone.

Which packages are needed is said in requirements.txt, never here. Runs down to Python 3.6 far enough to explain itself.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

from labkit.errors import UserError
from labkit.paths import ROOT

PYTHONS = ((3, 11), (3, 13))
REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Measured on Linux, downloads and installed packages together: 2.6 GB with torch's CPU build, 7.4 GB with its CUDA build.
NEEDED_GB, NEEDED_GB_WITH_CUDA = 3.5, 9.0
NETWORK_TROUBLE = re.compile("connection broken|timed out|Max retries|name resolution|ProxyError|SSLError|IncompleteRead|ConnectionError")


def pins():
    """{distribution name: exact version}, as requirements.txt has them."""
    if not REQUIREMENTS.is_file():
        raise UserError(f"{REQUIREMENTS} is missing: run the command from a complete copy of the repository.")
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def unmet():
    """What keeps the running interpreter from being the course's, one phrase a package; empty if nothing does."""
    from importlib import metadata  # missing before Python 3.8, where only the version check has to run

    phrases = []
    for name, pinned in pins().items():
        try:
            found = metadata.version(name).split("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        except metadata.PackageNotFoundError:
            phrases.append(f"{name} is missing")
        else:
            if found != pinned:
                phrases.append(f"{name} is {found}, not {pinned}")
    return phrases


def ensure_environment():
    """The interpreter to go on with: the running one if it holds every pin, otherwise that of .venv, made here if need be.

    Raises UserError, one sentence, when the environment cannot be made.
    """
    just_installed = os.environ.pop("LABKIT_JUST_INSTALLED", None)
    missing = unmet()
    if not missing or os.environ.get("LABKIT_NO_INSTALL"):
        return sys.executable
    if just_installed:
        raise UserError(f"{VENV} is damaged ({missing[0]}, although pip installed it): delete that folder and run the same command again.")
    if is_inside() or not is_complete():
        with one_at_a_time():
            if is_inside() or not is_complete():
                build(missing)
    return str(VENV_PYTHON)


def existing_environment():
    """The interpreter to go on with, of those that are there: none is made."""
    return str(VENV_PYTHON) if is_complete() and not is_inside() and unmet() else sys.executable


def is_inside():
    """True when the running interpreter is .venv's."""
    return os.path.realpath(sys.prefix) == os.path.realpath(VENV)


def interpreter_for_unsupported_python():
    """None where the running Python can run the course; otherwise .venv's interpreter if .venv is complete, or else a UserError."""
    if is_supported(sys.version_info[:2]):
        return None
    if is_complete() and is_supported(venv_version()):
        return str(VENV_PYTHON)
    found = ".".join(str(number) for number in sys.version_info[:3])
    raise UserError(
        f"The course needs Python 3.11, 3.12 or 3.13, and this is {found}: install one of them from python.org and run the command "
        "with it, for example `python3.12 -m labkit lab`."
    )


def is_supported(version):
    return version is not None and PYTHONS[0] <= version <= PYTHONS[1]


def stamp():
    return VENV / "labkit-installed"


def unfinished():
    return VENV / "labkit-unfinished"


def fingerprint():
    """Changes with the requirements and with the Python of .venv, and so tells whether .venv is the one they ask for."""
    return hashlib.sha256(REQUIREMENTS.read_bytes() + (VENV / "pyvenv.cfg").read_bytes()).hexdigest()


def is_complete():
    """True when an installation of exactly these requirements into .venv came to its end."""
    return is_whole() and stamp().exists() and stamp().read_text() == fingerprint()


def is_whole():
    """True when .venv has what `python3 -m venv` makes last, and the Python it was made from is still there."""
    return VENV_PYTHON.exists() and (VENV / "pyvenv.cfg").exists()


def venv_version():
    """(3, 12), say, of an existing .venv."""
    found = re.search(r"^version\w* *= *(\d+)\.(\d+)", (VENV / "pyvenv.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(int(number) for number in found.groups()) if found else None


@contextlib.contextmanager
def one_at_a_time():
    """Hold the lock that keeps two commands from installing at once; a second one waits here."""
    try:
        lock = open(ROOT / ".venv.lock", "a")
    except OSError:
        raise UserError(f"The course cannot write in {ROOT}: copy the folder to a place that is yours and run the command there.") from None
    with lock:
        told = False
        while not try_lock(lock):
            if not told:
                print("Another labkit command is installing; waiting for it.", flush=True)
                told = True
            time.sleep(0.5)
        yield


def try_lock(file):
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def build(missing):
    """Make .venv, or complete it. Torch goes first and alone, so that no other package chooses its build."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and os.path.realpath(active) != os.path.realpath(VENV):
        print(f"The active environment, {active}, is not the course's ({missing[0]}): the course gets its own.")
    cuda = has_nvidia_gpu()
    if unfinished().exists() or not is_whole():
        create(cuda)
    elif not is_supported(venv_version()):
        raise UserError(f"{VENV} was made with another Python than 3.11 to 3.13: delete that folder and run the same command again.")
    stamp().unlink(missing_ok=True)
    unfinished().touch()
    try:
        print(f"2 of 3: torch {pins()['torch']}", flush=True)
        install_torch(cuda)
        print(f"3 of 3: the other {len(pins()) - 1} packages and what they need", flush=True)
        fail_on(pip_install("-r", str(REQUIREMENTS)))
    except UserError:
        unfinished().unlink()  # pip ended by itself, so what it installed is whole and the next attempt goes on from there
        raise
    make_importable()
    stamp().write_text(fingerprint())
    unfinished().unlink()
    os.environ["LABKIT_JUST_INSTALLED"] = "1"


def create(cuda):
    """An empty .venv, marked as unfinished from its first moment on."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise UserError(
            "This Python cannot make an environment, its module `venv` or `ensurepip` is missing: install the Debian package with "
            "`sudo apt install python3-venv`, or use the Python from python.org, and run the same command again."
        )
    needed = NEEDED_GB_WITH_CUDA if cuda else NEEDED_GB
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < needed:
        raise UserError(f"The packages need {needed:.1f} GB of disk, and {ROOT} has {free:.1f} GB left: make room, or move the folder.")
    print(f"1 of 3: an empty environment, {VENV} (this happens once and takes a few minutes)", flush=True)
    try:
        if VENV.exists():
            shutil.rmtree(VENV)
        VENV.mkdir()
        unfinished().touch()
    except OSError as error:
        raise UserError(f"{VENV} cannot be made afresh ({error}): close what uses it, delete it, and run the same command again.") from None
    base_python = getattr(sys, "_base_executable", sys.executable)  # the running one may be the .venv that was just removed
    command = [base_python, "-m", "venv", str(VENV)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if made.returncode:
        raise UserError(f"`python3 -m venv` failed ({last_line(made.stdout)}): run the same command with the Python from python.org.")


def has_nvidia_gpu():
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    try:
        return subprocess.run([tool, "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_torch(cuda):
    """Prefer torch's CPU build where there is no GPU: on Linux the default one brings gigabytes of CUDA.

    First what pip has at hand (find-links), which asks no network; then PyTorch's CPU index; then wherever pip looks by itself.
    """
    torch = f"torch=={pins()['torch']}"
    if sys.platform.startswith("linux") and not cuda:
        for source in (["--no-index"], ["--index-url", CPU_INDEX, "--timeout", "10", "--retries", "0"]):
            if pip_install("--no-deps", *source, torch).returncode == 0:
                return
    fail_on(pip_install(torch))


def pip_install(*arguments):
    """Run pip in .venv: its progress goes to the terminal, its complaints into `.stderr` of the result."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    environment = dict(os.environ, PIP_USER="0")  # a configured `--user` would miss the environment
    return subprocess.run(command + list(arguments), stderr=subprocess.PIPE, universal_newlines=True, errors="replace", env=environment)


def fail_on(finished):
    """Raise UserError, with pip's own last word, unless pip succeeded."""
    if finished.returncode == 0:
        return
    reason = last_line(finished.stderr)
    if NETWORK_TROUBLE.search(finished.stderr):
        raise UserError(
            f"pip could not reach the package index ({reason}): connect to the internet, or set PIP_INDEX_URL to a mirror, "
            "and run the same command again."
        )
    log = VENV / "pip-errors.txt"
    log.write_text(finished.stderr, encoding="utf-8")
    raise UserError(f"pip failed ({reason}; its whole complaint is in {log}): put that right and run the same command again.")


def last_line(text):
    """The last line that names an error, or else the last one at all, without pip's label."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return ((errors or lines or ["it gave no reason"])[-1]).replace("ERROR: ", "")[:300]


def make_importable():
    """Let every Python program in .venv import labkit, VS Code's kernels included.

    The path in the .pth file is relative to it, so that a copied or renamed repository finds its own labkit.
    """
    site_packages = VENV / "Lib/site-packages" if os.name == "nt" else next(VENV.glob("lib/python*/site-packages"))
    (site_packages / "labkit.pth").write_text(os.path.relpath(ROOT, site_packages) + "\n")
