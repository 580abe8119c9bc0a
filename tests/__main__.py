"""All checks of the project in one command: `python -m tests [pytest arguments]`."""

from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parent.parent
CHECKS = (
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["src_snippets.assemble", "--check"],
    ["pytest"],
)


def main(arguments: list[str]) -> int:
    """Runs the checks in turn; returns the status of the first that fails, else 0."""
    for check in CHECKS:
        extra = arguments if check == ["pytest"] else []
        print("$ python -m", *check, *extra, flush=True)
        status = subprocess.run([sys.executable, "-m", *check, *extra], cwd=ROOT).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
