"""Notebooks as files: finding them and executing them without a browser. Students' copies are made in student_copies.py."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from queue import Empty

from labkit.errors import UserError

_LOOK_AGAIN = 2.0  # seconds


def list_notebooks(folder: Path) -> list[Path]:
    """The notebooks of `folder` in the order of their names. Raises UserError if there is none."""
    notebooks = sorted(path for path in folder.glob("*.ipynb") if path.is_file())
    if not notebooks:
        raise UserError(f"{folder} holds no notebook: name a folder that does, or take a complete copy of the repository.")
    return notebooks


def find_notebook(name: str, folder: Path) -> Path:
    """The one notebook of `folder` that `name` means: `03`, `03_lora`, `03_lora.ipynb` and `work/03_lora.ipynb` mean the same.

    Raises UserError if there is none, or more than one.
    """
    stem = Path(name).name.removesuffix(".ipynb")
    notebooks = list_notebooks(folder)
    matches = [path for path in notebooks if path.stem == stem] or [path for path in notebooks if path.stem.startswith(stem)]
    if len(matches) != 1:
        names = ", ".join(path.stem for path in matches or notebooks)
        raise UserError(f"{name} is {'no notebook' if not matches else 'more than one notebook'} of {folder.name}/: name one of {names}.")
    return matches[0]


@dataclass
class Execution:
    """What executing one notebook took and how it ended: wall-clock minutes, peak resident memory of the kernel's process tree in MiB."""

    notebook: str
    minutes: float
    peak_mib: int
    status: str  # ok or failed
    error: str = ""  # of a failed one: the cell, the exception's name and its message


def execute(path: Path, out: Path, timeout: int, on_cell: Callable[[], None] = lambda: None) -> Execution:
    """Execute the notebook at `path` in a fresh kernel, started in its folder, and write the executed copy into the folder `out`.

    timeout: seconds for one cell.   on_cell: called after every cell.   A failing notebook is no exception: see Execution.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, nbformat.ValidationError) as failure:
        return Execution(path.stem, 0.0, 0, "failed", f"no readable notebook: {' '.join(str(failure).split())[:200]}")
    position = {"cell": 0}  # of the cell under way, counted from 1 as a reader would

    def started(cell, cell_index):
        position["cell"] = cell_index + 1

    async def ready(notebook):
        for channel in (client.kc.shell_channel, client.kc.iopub_channel):
            look_again(channel)

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_notebook_start=ready,
        on_cell_start=started,
        on_cell_complete=lambda cell, cell_index: on_cell(),
    )
    error, begin = "", time.perf_counter()
    with MemoryWatch(client) as memory:
        try:
            client.execute(stderr=subprocess.DEVNULL)  # the kernel's own log; what a cell writes is in the executed notebook
        except CellExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except CellTimeoutError:
            error = f"TimeoutError: it ran longer than {timeout} s"
        except DeadKernelError:
            error = "DeadKernelError: the kernel died (out of memory?)"
    minutes = round((time.perf_counter() - begin) / 60, 2)
    if error:
        error = f"cell {position['cell']} of {len(notebook.cells)}, " + " ".join(error.split())[:200]
    notebook.metadata["labkit"] = {"minutes": minutes, "peak_mib": memory.peak_mib}
    write_measured(notebook, minutes, memory.peak_mib)
    nbformat.write(notebook, out / path.name)
    return Execution(path.stem, minutes, memory.peak_mib, "failed" if error else "ok", error)


def look_again(channel, seconds: float = _LOOK_AGAIN) -> None:
    """Let the waiting `get_msg` of a client's channel look anew every so many seconds.

    zmq.asyncio can miss that a message has come (zeromq/pyzmq#2173): the kernel is idle, its reply lies in the socket, and nbclient, which looks
    once with the cell's whole timeout, waits on. Seen here with the reply in the socket (POLLIN set); a new look finds it.
    """
    look_once = channel.get_msg

    async def get_msg(timeout: float | None = None):
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await look_once(timeout=max(0.0, min(seconds, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    raise

    channel.get_msg = get_msg


def write_measured(notebook, minutes: float, peak_mib: int) -> None:
    """Put what was measured into the title cell's line that starts with `Measured:`; a notebook without one stays as it is."""
    title = notebook.cells[0]
    line = f"Measured: {60 * minutes:.0f} s and {peak_mib:,} MiB at the peak, with one thread (`python3 -m labkit run --inplace`)"
    title.source = re.sub(r"^Measured:.*$", line, title.source, flags=re.MULTILINE)


class MemoryWatch:
    """Samples, in a thread, the resident memory of a client's kernel and of the kernel's children; `peak_mib` is the largest sum."""

    def __init__(self, client, seconds: float = 0.1):
        self.client, self.seconds, self.peak_mib = client, seconds, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stop.set()
        self.thread.join()

    def watch(self):
        while not self.stop.wait(self.seconds):
            pid = getattr(getattr(self.client.km, "provisioner", None), "pid", None)
            if pid:
                self.peak_mib = max(self.peak_mib, resident_mib(pid))


def resident_mib(pid: int) -> int:
    """Resident memory of process `pid` and all below it, in MiB; 0 when it has ended."""
    import psutil

    try:
        processes = [psutil.Process(pid)]
        processes += processes[0].children(recursive=True)
        return round(sum(process.memory_info().rss for process in processes) / 2**20)
    except psutil.Error:
        return 0


def execute_all(paths: Iterable[Path], out: Path, timeout: int) -> list[Execution]:
    """Execute notebooks one after the other, with a progress bar over their cells; one that fails stops no other."""
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    paths = list(paths)
    lengths = [count_cells(path) for path in paths]
    executions = []
    with tqdm(total=sum(lengths), unit="cell") as bar:
        for number, path in enumerate(paths, start=1):
            bar.set_description(path.stem)
            executions.append(execute(path, out, timeout, on_cell=bar.update))
            bar.update(sum(lengths[:number]) - bar.n)  # the cells that are not code, or come after an error
            write_results(executions, out)
    return executions


def count_cells(path: Path) -> int:
    """Cells in the notebook at `path`; 0 if it cannot be read."""
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["cells"])
    except (ValueError, KeyError, TypeError):
        return 0


def write_results(executions: list[Execution], out: Path) -> None:
    """Write the table as results.csv and results.md into the folder `out`."""
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Execution)])
        writer.writeheader()
        writer.writerows(asdict(execution) for execution in executions)
    (out / "results.md").write_text(markdown_table(executions), encoding="utf-8")


def markdown_table(executions: list[Execution]) -> str:
    """The results as a Markdown table that also reads well in a terminal."""
    rows = [("notebook", "minutes", "peak MiB", "result")]
    for execution in executions:
        result = f"{execution.status}: {execution.error}" if execution.error else execution.status
        rows.append((execution.notebook, f"{execution.minutes:.2f}", str(execution.peak_mib), result.replace("|", "\\|")))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"| {row[0]:<{widths[0]}} | {row[1]:>{widths[1]}} | {row[2]:>{widths[2]}} | {row[3]:<{widths[3]}} |" for row in rows]
    lines.insert(1, f"| {'-' * widths[0]} | {'-' * (widths[1] - 1)}: | {'-' * (widths[2] - 1)}: | {'-' * widths[3]} |")
    return "\n".join(lines) + "\n"
