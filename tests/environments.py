"""Runs the notebook with the packages of a platform: `python -m tests.environments kaggle`.

`colab` is another, `oldest` has the lowest versions that `requirements.txt` allows. A virtual
environment is made in `.environments/`, with the versions in `tests/constraints/` and without the
packages that are absent there. The notebook, alone in an empty folder, is executed on the
synthetic demo: on Kaggle without an index, as with the internet off; on Colab it installs what is
absent. 5 GB and some minutes. Python is the platform's version where this machine has it (on the
path or under pyenv), else the one that runs this.
"""

import argparse
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time

from src_snippets.setup.install import PACKAGES

ROOT = Path(__file__).parents[1]
JUPYTER = ("nbclient", "ipykernel")


def absent_packages(constraints: Path) -> list[str]:
    """The packages that the first line of a constraints file calls absent."""
    return constraints.read_text().splitlines()[0].split("absent:")[1].split()


def packages_to_install(constraints: Path) -> list[str]:
    """All packages that the notebook uses, but for those that are absent."""
    absent = absent_packages(constraints)
    names = {line: re.split(r"[<>=]", line)[0] for line in PACKAGES}
    if unknown := set(absent) - set(names.values()):
        raise ValueError(f"{constraints}: {', '.join(sorted(unknown))} are not used; correct it.")
    return [line for line, name in names.items() if name not in absent]


def find_python(constraints: Path) -> str:
    """The Python of the version that the first line names, else the one that runs this."""
    version = re.search(r"Python (\d\.\d+)", constraints.read_text())[1]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [path for path in [shutil.which(f"python{version}")] if path]
    for path in [*map(str, pyenv.glob(f"{version}.*/bin/python")), *found]:
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # no empty shim
            return path
    print(f"No Python {version} on this machine; {sys.executable} takes its place.")
    return sys.executable


def build(name: str) -> Path:
    """Makes or completes the environment; its Python."""
    constraints = ROOT / "tests" / "constraints" / f"{name}.txt"
    folder = ROOT / ".environments" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([find_python(constraints), "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", constraints]
    subprocess.run([*install, *packages_to_install(constraints), *JUPYTER], check=True)
    return python


def execute(python: Path, offline: bool) -> str:
    """Executes a copy of the notebook in an empty folder; returns a line about its results.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environment |= dict(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull) if offline else {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "hw3.ipynb", folder)
        command = [python.with_name("jupyter"), "execute", "hw3.ipynb"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        results = Path(folder) / "results"
        (history,) = (results / "runs").glob("*/history.csv")
        header, *_, last = history.read_text().splitlines()
        scores = dict(zip(header.split(","), last.split(","), strict=True))
        size = (results / "test-results.json").stat().st_size
    return f"AP50 {float(scores['AP50']):.3f}, test-results.json of {size:,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("kaggle", "colab", "oldest"))
    options = parser.parse_args()
    python = build(options.name)
    code = "import sys, torch, numpy as n; print(sys.version[:7], torch.__version__, n.__version__)"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    start = time.perf_counter()
    results = execute(python, offline=options.name == "kaggle")
    print(f"{options.name}: Python, torch, numpy {versions.stdout.strip()}: {results}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
