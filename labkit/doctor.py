"""What works on this machine, found out by trying. It changes nothing, and runs where no package is installed, too.

Whatever may crash an interpreter is tried in a child process (`python -m labkit.doctor PROBE`), so that the report always comes to its end.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from labkit.install import NEEDED_GB, is_complete, pins, unmet
from labkit.paths import DATA, ROOT
from labkit.processes import THREADS, course_environment

MAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "mujoco", "gymnasium", "numpy", "jupyterlab")
PROBE_SECONDS = 120


def report():
    """Yield (name, status, detail), one after the other as they are known.

    status: ok, optional (it does not work here, and no lesson needs it), differs (from requirements.txt) or MISSING (a lesson needs it).
    """
    with ThreadPoolExecutor(2) as pool:
        outcomes = {name: pool.submit(try_in_child, name) for name in PROBES}
        yield from machine()
        yield from packages()
        for name, (title, required, _) in PROBES.items():
            works, detail = outcomes[name].result()
            yield title, "ok" if works else "MISSING" if required else "optional", detail
        yield from surroundings()


def machine():
    """The lines that need no package."""
    from labkit import __version__

    free = shutil.disk_usage(ROOT).free / 1e9
    room = is_complete() or not unmet() or free > NEEDED_GB
    yield "labkit", "ok", f"{__version__} in {ROOT}"
    yield "system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "Python", "ok", f"{platform.python_version()}, {sys.executable}"
    yield "processor", "ok", f"{usable_cores()} cores; a lesson computes on {THREADS['OMP_NUM_THREADS']} thread"
    yield "memory", "ok", memory()
    yield "disk", "ok" if room else "MISSING", f"{free:.0f} GB free" + ("" if room else f", and the packages need {NEEDED_GB} GB")


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory():
    try:
        import psutil
    except ImportError:
        return "not known before psutil is installed"
    now = psutil.virtual_memory()
    return f"{now.total / 2**30:.1f} GiB, of which {now.available / 2**30:.1f} are free"


def packages():
    """One line for each main package, and one for all others."""
    phrases = {phrase.split(" is ")[0]: phrase for phrase in unmet()}
    for name in MAIN_PACKAGES:
        yield name, package_status([phrases[name]] if name in phrases else []), phrases.pop(name, pins()[name])
    others = list(phrases.values())
    detail = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    yield "other packages", package_status(others), detail or f"all {len(pins()) - len(MAIN_PACKAGES)} as in requirements.txt"


def package_status(phrases):
    return "MISSING" if any(phrase.endswith(" is missing") for phrase in phrases) else "differs" if phrases else "ok"


def surroundings():
    """The lines that need a look at the folder and the desktop."""
    import webbrowser

    checkpoint = DATA / "tiny_vla"
    there = checkpoint.is_dir() and any(checkpoint.glob("*.safetensors"))
    yield "tiny VLA", "ok" if there else "MISSING", f"{checkpoint.relative_to(ROOT)}" + ("" if there else " holds no *.safetensors")
    try:
        yield "browser", "ok", f"JupyterLab opens in {webbrowser.get().name}"
    except webbrowser.Error:
        yield "browser", "optional", "none found: open the address that `lab --no-browser` prints"


def gpu():
    import torch

    if torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "Apple MPS"
    raise RuntimeError("none, and no lesson needs one")


def four_bit():
    """An NF4 layer on the CPU against the same layer in float32: 4 bits cost about a tenth of the output's size."""
    import bitsandbytes
    import torch

    exact = torch.nn.Linear(64, 64, bias=False)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(exact.state_dict())
    layer.to("cpu")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    error = (layer(x) - exact(x)).norm() / exact(x).norm()
    if layer.weight.dtype != torch.uint8 or not 0.01 < error < 0.3:
        raise RuntimeError(f"the layer is {layer.weight.dtype}, its error {error:.2f}")
    return f"an NF4 layer on the CPU is within {100 * error:.0f} % of float32"


BALL_ON_FLOOR = """<mujoco><worldbody><light pos="0 0 2"/><geom type="plane" size="3 3 .1"/>
<body pos="0 0 1"><freejoint/><geom size=".1"/></body></worldbody></mujoco>"""


def physics():
    import mujoco

    model = mujoco.MjModel.from_xml_string(BALL_ON_FLOOR)
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data, nstep=1000)
    if not 0.09 < data.qpos[2] < 0.11:
        raise RuntimeError(f"a ball of radius 0.1 m came to rest at {data.qpos[2]:.3f} m")
    return f"MuJoCo {mujoco.__version__}: a ball falls and comes to rest"


def ray_camera():
    import mujoco
    import numpy as np

    model = mujoco.MjModel.from_xml_string(BALL_ON_FLOOR)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    directions = np.array([[0.0, 0, -1], [1, 0, -1]])
    geoms, distances, normals = np.zeros(2, np.int32), np.zeros(2), np.zeros(6)
    mujoco.mj_multiRay(model, data, np.array([0.0, 0, 2]), directions.ravel(), None, True, -1, geoms, distances, normals, 2, 10.0)
    if not np.allclose(distances, [0.9, 2.0]):  # along (1, 0, -1) the plane is 2 vectors away
        raise RuntimeError(f"two rays met something at {distances}, expected 0.9 and 2.0")
    return "mj_multiRay sees a ball and the floor"


def opengl():
    import mujoco

    model = mujoco.MjModel.from_xml_string(BALL_ON_FLOOR)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    try:
        with mujoco.Renderer(model, 32, 32) as renderer:
            renderer.update_scene(data)
            brightest = renderer.render().max()
    except Exception as error:
        raise RuntimeError(f"not needed; mujoco.Renderer gave {type(error).__name__}") from error
    if brightest == 0:
        raise RuntimeError("not needed; mujoco.Renderer drew a black image")
    return "mujoco.Renderer draws (not needed)"


def jupyterlab():
    import jupyterlab.labapp

    return f"starts as {jupyterlab.labapp.LabApp.name} {jupyterlab.__version__}"


def landlock():
    """The version of Landlock's interface, from landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)."""
    version = libc().syscall(444, None, 0, 1)
    if version < 1:
        raise RuntimeError("no: this kernel has none, or it is off")
    return f"yes, ABI {version}"


def seccomp():
    with open("/proc/self/status", encoding="ascii") as status:
        if not any(line.startswith("Seccomp:") for line in status):
            raise RuntimeError("no: this kernel was built without it")
    return "yes"


def namespaces():
    user_and_pid = 0x10000000 | 0x20000000
    if libc().unshare(user_and_pid):
        raise RuntimeError("no: this process may not make them")
    return "yes"


def libc():
    import ctypes

    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"no: {platform.system()} has none")
    return ctypes.CDLL(None, use_errno=True)


def on_linux(probe):
    libc()
    return probe()


# name: (title, whether a lesson needs it, what to try). A probe returns the detail of its line, or raises.
PROBES = {
    "gpu": ("GPU", False, gpu),
    "four_bit": ("4-bit weights", True, four_bit),
    "physics": ("physics", True, physics),
    "ray_camera": ("ray camera", True, ray_camera),
    "opengl": ("OpenGL", False, opengl),
    "jupyterlab": ("JupyterLab", True, jupyterlab),
    "landlock": ("Landlock", False, landlock),
    "seccomp": ("seccomp", False, partial(on_linux, seccomp)),
    "namespaces": ("user namespaces", False, namespaces),
}


def try_in_child(name):
    """(works, detail) of a probe. A child that crashes, hangs or cannot import is one that does not work."""
    command = [sys.executable, "-m", "labkit.doctor", name]
    try:
        child = subprocess.run(command, env=course_environment(), capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    said = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines()
    return child.returncode == 0, said[-1][:140] if said else f"it ended with exit code {child.returncode} and said nothing"


def main(probe):
    """In the child: print the probe's detail, or its one-line reason on stderr."""
    try:
        print(PROBES[probe][2]())
    except Exception as error:
        print(error if type(error) is RuntimeError else f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # some OpenGL drivers crash while the interpreter shuts down
