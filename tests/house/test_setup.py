"""`make setup` takes a Python that fits, and says truly what is missing where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "{}.{}".format(*sys.version_info)
OLD = '[ "$1" = -c ] && case $2 in *exit*) exit 1 ;; *print*) echo 3.9 ;; esac'
WITHOUT_ENSUREPIP = f'exec {sys.executable} -c "import sys; sys.modules[\'ensurepip\'] = None; exec(sys.argv[1])" "$2"'
FIT = f'exec {sys.executable} "$@"'


def choose(folder: Path, programs: dict[str, str], *named: str) -> subprocess.CompletedProcess[str]:
    """Run `.ci/python` where these programs, shell scripts, are the only Pythons."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["/bin/bash", ROOT / ".ci" / "python", *named], env={"PATH": str(folder)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        ({"python3": FIT}, "python3"),
        ({"python3": FIT, "python3.12": FIT}, "python3.12"),
        ({"python3": FIT, "python3.13": FIT, "python3.11": FIT}, "python3.11"),
        ({"python3.11": WITHOUT_ENSUREPIP, "python3.13": FIT}, "python3.13"),
    ],
)
def test_the_first_that_fits_is_taken(tmp_path: Path, programs: dict[str, str], chosen: str) -> None:
    assert choose(tmp_path, programs).stdout == f"{chosen}\n"


def test_a_named_one_is_taken_or_refused(tmp_path: Path) -> None:
    assert choose(tmp_path, {"python3.11": FIT, "python3.12": FIT}, "python3.12").stdout == "python3.12\n"
    refused = choose(tmp_path, {}, "python3.13")
    assert refused.returncode == 1
    assert "  python3.13: not found\n" in refused.stderr
    assert "python3.11" not in refused.stderr.partition("Here:")[2]


def test_what_is_missing_is_said_of_each(tmp_path: Path) -> None:
    done = choose(tmp_path, {"python3": OLD, "python3.12": WITHOUT_ENSUREPIP})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[1:5] == [
        "  python3.11: not found",
        f"  python3.12: Python {VERSION} without ensurepip (Debian, Ubuntu: apt-get install python{VERSION}-venv)",
        "  python3.13: not found",
        "  python3: is Python 3.9",
    ]


def test_an_environment_of_another_python_is_not_taken_for_the_named_one(tmp_path: Path) -> None:
    """It is there already, so nothing is installed."""
    environment, other = tmp_path / "venv", tmp_path / "python3.9"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / ".stamp").touch()
    other.write_text("#!/bin/sh\necho Python 3.9.2\n")
    other.chmod(0o755)
    said = {
        python: subprocess.run(
            ["make", "setup", f"VENV={environment}", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True
        )
        for python in (sys.executable, str(other))
    }
    assert said[sys.executable].returncode == 0
    assert said[str(other)].returncode != 0
    assert f"which is not {other}" in said[str(other)].stderr
