"""Where things lie, whatever the working directory. What is in the folders is the business of the modules that read them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
WORK = ROOT / "work"
RUNS = ROOT / "runs"
