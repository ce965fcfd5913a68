"""What pip installs: complete, and at home beside a project whose own folders have the names of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.harness.clone import ROOT, clone
from tests.harness.study import change, write_study

WRITTEN = {"north.csv", "approved.toml"}
PACKAGES = ("broker", "console", "server_worker", "shared", "simulation", "site_worker")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ENVIRONMENT["PYTHONDONTWRITEBYTECODE"] = "1"
NETS = """
from torch import nn

def make(width):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
"""


def output(*command: str | Path, cwd: Path | None = None, code: int = 0) -> tuple[str, str]:
    """What a command writes to stdout and to stderr."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return clone(tmp_path_factory.mktemp("clone") / "source")


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    (source / "examples" / "cholesterol" / "north.csv").write_text("what prepare.py wrote\n")
    (source / "examples" / "cholesterol" / "approved.toml").write_text("# what nightsplit approve wrote\n")
    place = source.parent
    output(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", source, "-w", place)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel; its dependencies are those of ours, by a path."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    output(sys.executable, "-m", "venv", "--without-pip", venv)
    programs = venv / "bin"
    ours = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    packages = Path(output(programs / "python", "-c", "import site; print(*site.getsitepackages())")[0].split()[0])
    (packages / "dependencies.pth").write_text("\n".join(ours))
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    output(*pip, "install", "--no-deps", "--no-index", wheel)
    for file in (packages / "nightsplit").rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    return programs


@pytest.fixture
def project(tmp_path) -> Path:
    """A study with a model of the user's own, beside folders that we have too."""
    write_study(tmp_path)
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the project has its own {name}')\n")
    (tmp_path / "nets.py").write_text(NETS)
    named = f'"nets.py:make"\ncode_sha256 = "{hashlib.sha256(NETS.encode()).hexdigest()}"'
    change(tmp_path / "run.toml", '"nightsplit.models:mlp"', named)
    change(tmp_path / "run.toml", "{ inputs = 3, hidden = [8, 4], outputs = 1 }", "{ width = 7 }")
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """sha256 of a folder's files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_holds_the_packages_the_pages_of_errors_and_the_demos_example(source, wheel):
    holds = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"nightsplit/{package}/{name}" for package in PACKAGES for name in files(source / package)}
    code |= {f"nightsplit/{path.name}" for path in (source / "nightsplit").glob("*.py")}
    pages = {f"nightsplit/docs/errors/{path.name}" for path in (source / "docs" / "errors").glob("[0-9]*.md")}
    place = source / "examples" / "cholesterol"
    example = {f"nightsplit/examples/cholesterol/{path.name}" for path in place.iterdir() if path.name not in WRITTEN}
    assert holds == code | pages | (example - {"nightsplit/examples/cholesterol/compose"})


def test_it_starts_beside_a_project_with_such_folders(installed, project):
    assert (
        "begin with: nightsplit demo"
        in " ".join(output(installed / "nightsplit", "--help", cwd=project)[0].split()).lower()
    )
    page, _ = output(installed / "nightsplit", "explain", "104", cwd=project)
    assert page == (ROOT / "docs" / "errors" / "104.md").read_text(encoding="utf-8")
    assert output(installed / "python", "-m", "nightsplit", "explain", "E104", cwd=project)[0] == page
    for wrong in ("999", "../errors/104", "²"):
        _, err = output(installed / "nightsplit", "explain", wrong, cwd=project, code=1)
        assert err.startswith(f"E120 Unknown error number: {wrong}. Fix: ")


def test_a_model_of_the_projects_own(installed, project):
    out, err = output(installed / "python", "-m", "nightsplit", "doctor", "north.toml", "--json", cwd=project)
    checks = {check["check"]: check["found"] for check in json.loads(out)["checks"]}
    assert checks["model and messages"].startswith("parameters: bottom 28, top 8;")
    assert err == ""
    output(installed / "nightsplit", "open", "server.toml", cwd=project)
    out, err = output(installed / "nightsplit", "site", "north.toml", "--exit-when-idle", "1", cwd=project)
    assert "server is offline; " in out
    assert err == ""


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_demo_plays_from_the_wheel(installed, project):
    before = files(installed.parent)
    played = json.loads(output(installed / "nightsplit", "demo", "--json", cwd=project)[0])
    promised = re.search(r"\b[0-9a-f]{64}\b", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert promised is not None
    assert played["sha256"] == played["sha256_killed"] == promised[0]
    assert files(installed.parent) == before, "something was written beside the packages"
    for work in (project / "runs").iterdir():
        assert all(file.stat().st_mode & 0o200 for file in work.glob("*.toml")), "an example's copy may be edited"
    assert len(list((project / "runs").glob("*/report/report.md"))) == 2
