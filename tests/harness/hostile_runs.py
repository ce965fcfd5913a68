"""Runs whose run.toml attacks the hospital that reads it, and a process of its own in which every command meets them
(python -m tests.harness.hostile_runs).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

MODEL = """factory = "nightsplit.models:mlp"
settings = { inputs = 3, hidden = [8, 4], outputs = 1 }
"""
EVIL = 'from pathlib import Path\nPath("canary").write_text("code of a run has run")\n\ndef make(**settings): ...\n'
"""Content of every file and module that the attacker has put somewhere."""
SHA256 = hashlib.sha256(EVIL.encode()).hexdigest()
OTHER_SHA256 = hashlib.sha256(b"def make(): ...\n").hexdigest()

FOLDER = Path("hostile")
"""Folder of run.toml and site.toml below the current one, which holds the attacker's modules."""
CANARY = Path("canary")

VERBS: Mapping[str, tuple[str, ...]] = {
    "doctor": ("--json",), "site": ("--exit-when-idle", "0.1"), "predict": (), "query": (), "privacy": (),
    "approve": ("--by", "somebody in a hurry", "--yes"),
}  # fmt: skip


def factory(name: str, /, **settings: object) -> str:
    pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    return f"factory = {json.dumps(name)}\nsettings = {{ {pairs} }}\n"


def file(name: str, sha256: str | None = SHA256) -> str:
    return factory(name) + (f'code_sha256 = "{sha256}"\n' if sha256 else "")


def initial(name: str) -> str:
    return MODEL + f"initial = {json.dumps(name)}\ninitial_sha256 = {json.dumps(SHA256)}\n"


TOUCH = {"cmd": f"touch {CANARY}"}
NOT_LISTED: Mapping[str, str] = {
    "a shell by subprocess": factory("subprocess:getoutput", **TOUCH),
    "a shell by os": factory("os:system", command=TOUCH["cmd"]),
    "a shell by its module in C": factory("posix:system", command=TOUCH["cmd"]),
    "a script by runpy": factory("runpy:run_path", path_name="evil.py"),
    "a module by runpy": factory("runpy:run_module", mod_name="evil"),
    "code from the internet": factory("torch.hub:load", repo_or_dir=".", model="make", source="local"),
    "a pickle": factory("torch:load", f="evil.pt", weights_only=False),
    "a library in C": factory("ctypes:CDLL", name="evil.so"),
    "an import by importlib": factory("importlib:import_module", name="evil"),
    "an import by builtins": factory("builtins:exec", source="import evil"),
    "a file emptied by builtins": factory("builtins:open", file="canary", mode="w"),
    "a table that an error quotes": factory("numpy:loadtxt", fname="patients.csv", skiprows=1),
    "a folder deleted": factory("shutil:rmtree", path="."),
    "a module of the standard library": factory("antigravity:fly"),
    "a module of the current folder": factory("evil:make"),
    "a package of the current folder": factory("evil_package.networks:make"),
    "a package whose name begins like a listed one": factory("msgspec_networks:make"),
    "a module above a listed one": factory("pydantic:BaseModel"),
}
WRONG_FORM: Mapping[str, str] = {
    "the command line of nightsplit": factory("nightsplit.console.cli:run", arguments=["demo"]),
    "a module below its networks": factory("nightsplit.models.nn:Linear"),
    "the package itself": factory("nightsplit:models"),
    "a name in double underscores": factory("nightsplit.models:__import__", name="evil"),
    "a file above": file("../evil.py:make"),
    "a file anywhere": file("/tmp/evil.py:make"),
    "a file in a folder": file("evil_package/networks.py:make"),
    "a hidden file": file(".evil.py:make"),
    "a file without its hash": file("evil.py:make", None),
    "a hash without a file": MODEL + f'code_sha256 = "{SHA256}"\n',
    "a hash that is none": file("evil.py:make", "0" * 63 + "\\n"),
    "initial weights anywhere": initial("/etc/passwd"),
    "initial weights above": initial("../weights.safetensors"),
    "a table as initial weights": initial("patients.csv"),
}
NOT_APPROVED: Mapping[str, str] = {
    "what its module of networks only imports": factory("nightsplit.models:ModelParts"),
    "a file that fits its hash": file("evil.py:make"),
    "the hash of another file": file("evil.py:make", OTHER_SHA256),
    "a file that leads out": file("link.py:make"),
    "a file that leads to itself": file("loop.py:make"),
    "a folder as a file": file("folder.py:make"),
    "a file that another process writes": file("pipe.py:make"),
    "initial weights that lead out": initial("link.safetensors"),
    "a listed package that is not installed": factory("evil_listed:make"),
    "a listed package that is installed": factory("msgspec.json:encode", obj=1),
}
RUNS = {**NOT_LISTED, **WRONG_FORM, **NOT_APPROVED}


def write_runs(study: Path) -> None:
    """Make a folder of the study's files for each hostile run, and the attacker's modules beside them."""
    plain = (study / "run.toml").read_text()
    (study / "evil_package").mkdir()
    for name in ("evil", "evil_package/__init__", "evil_package/networks", "evil_listed", "msgspec_networks"):
        (study / f"{name}.py").write_text(EVIL)
    policy = study / "policy.toml"
    policy.write_text(policy.read_text() + 'packages = ["evil_listed", "msgspec", "pydantic.main"]\n')
    for name, model in RUNS.items():
        folder = study / FOLDER / name
        folder.mkdir(parents=True)
        for kept in ("north.toml", "policy.toml", "patients.csv"):
            shutil.copy(study / kept, folder)
        (folder / "evil.py").write_text(EVIL)
        (folder / "link.py").symlink_to(study / "evil.py")
        (folder / "loop.py").symlink_to("loop.py")
        (folder / "folder.py").mkdir()
        os.mkfifo(folder / "pipe.py")
        (folder / "link.safetensors").symlink_to("/etc/passwd")
        text = plain.replace(MODEL, model)
        if "initial =" in model:
            text = text.replace("split_labels", "fedavg_transfer").replace("window = 1000\n", "")
            policy = folder / "policy.toml"
            allowed = policy.read_text().replace('"counts"', '"weights", "counts"')
            policy.write_text(f"{allowed}server_sets_weights = true\n")
        (folder / "run.toml").write_text(text)


def meet(verb: str, folder: Path, run: Callable[[list[str]], int]) -> int:
    """Carry out a command, and return the number of its refusal; 0 if it succeeded."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([verb, str(folder / "north.toml"), *VERBS[verb]])
    if code == 0:
        return 0
    said = out.getvalue() if verb == "doctor" else err.getvalue()
    return int(re.findall(r"E(\d{3}) ", said)[-1])


def main() -> None:
    """Print for each command its refusals by run, what of them it has imported, and the files that it has changed."""
    from nightsplit.console.cli import run

    told = {}
    for verb in VERBS:
        before = contents(Path())
        met = {name: meet(verb, FOLDER / name, run) for name in RUNS}
        hostile = ("evil", "msgspec_networks", "nightsplit_model", "antigravity")
        imported = [name for name in sys.modules if name.startswith(hostile)]
        after = contents(Path())
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        told[verb] = {"met": met, "imported": imported, "changed": changed}
    print(json.dumps(told))


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
