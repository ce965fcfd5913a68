"""The house rules that no type checker knows: what is never called, how long a file is. Who may import whom stands
in .importlinter.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
import torch

from nightsplit.server_worker.protocols import make_server_role
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, systems
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.protocols import make_site

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "shared", "site_worker", "server_worker", "simulation", "console")
BESIDE_PYTHON = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
LONGEST = 400
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
"""They run code that comes with the data."""
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle"}


def files_of(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCE = files_of(*PACKAGES)
EVERYTHING = files_of(*PACKAGES, "benchmarks", "examples")  # tests send pickles, to see them refused


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """What a file imports, as far as its text tells: "package.module", or "package.module.name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(imported: str, allowed: str) -> bool:
    return imported == allowed or imported.startswith(f"{allowed}.")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_the_files_are_found() -> None:
    assert len(SOURCE) > 40
    assert {path.relative_to(ROOT).parts[0] for path in SOURCE} == set(PACKAGES)


def test_the_rules_of_who_may_import_whom() -> None:
    lint = subprocess.run(
        ["lint-imports", "--no-cache", "--no-logo"],
        cwd=ROOT,
        env=BESIDE_PYTHON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout


def test_only_the_rabbitmq_modules_know_pika() -> None:
    using = [name_of(path) for path in SOURCE if any(is_within(used, "pika") for used in imports_of(parsed(path)))]
    assert using
    assert [name for name in using if not name.startswith("broker/rabbitmq/")] == []


def test_only_the_mailbox_reads_headers_and_publishes() -> None:
    """Brokers move bytes; `nightsplit dlq` marks the end of a queue with a message that is none."""
    below = ("shared/wire/", "broker/", "simulation/")
    pipeline = {"shared/engine/mailbox.py"}
    for path in (path for path in SOURCE if not name_of(path).startswith(below)):
        tree = parsed(path)
        reads = any(
            is_within(used, f"nightsplit.shared.wire.{m}") for used in imports_of(tree) for m in ("format", "head")
        )
        publishes = [
            ast.unparse(call.args[0])
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("link.publish")
        ]
        if name_of(path) == "console/dead_letters.py":
            assert publishes == ["self._queues.dead"]
        elif name_of(path) not in pipeline:
            assert not reads, f"{name_of(path)} reads messages beside the mailbox"
            assert not publishes, f"{name_of(path)} publishes beside the mailbox"


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that run code which comes with the data."""
    yield from (f"imports {used}" for used in imports_of(tree) if used.split(".")[0] in UNSAFE_MODULES)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called in UNSAFE_CALLS:
            yield f"line {call.lineno} calls {called}"
        pickles = [ast.unparse(k.value) for k in call.keywords if k.arg == "allow_pickle"]
        if pickles not in ([], ["False"]) or (called in ("np.load", "numpy.load") and not pickles):
            yield f"line {call.lineno}: say allow_pickle=False"


def test_nothing_runs_code_that_comes_with_data() -> None:
    assert [f"{name_of(path)}: {found}" for path in EVERYTHING for found in unsafe(parsed(path))] == []
    for code in ("import pickle", "torch.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(x)"):
        assert list(unsafe(ast.parse(code))), code
    assert not list(unsafe(ast.parse("np.load(f, allow_pickle=False)")))


def test_no_file_tells_two_stories() -> None:
    files = [*EVERYTHING, *files_of("tests")]
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_imports_inside_functions_are_seen() -> None:
    tree = ast.parse("import pickle\ndef f():\n    from pika import spec\n")
    assert list(imports_of(tree)) == ["pickle", "pika.spec"]


def config_of(protocol: str) -> RunConfig:
    return msgspec.convert(
        {
            "run": {"id": "house", "protocol": protocol, "sites": ["mercy"], "batch_size": 2},
            "model": {
                "factory": "nightsplit.models:mlp",
                "settings": {"inputs": 3, "hidden": [4, 4], "outputs": 1},
                "cut": 1,
                "head_cut": 2,
            },
            "task": {"kind": "regression"},
            "data": {"features": ["a", "b", "c"]},
        },
        RunConfig,
    )


@pytest.mark.parametrize("protocol", systems(*TRAINING))
def test_every_system_has_both_halves(protocol: str, tmp_path: Path) -> None:
    few = Dataset(torch.zeros(4, 3), torch.zeros(4), ("a", "b", "c", "d"))
    site = make_site("mercy", config_of(protocol), Splits(few, few, few), "one", tmp_path)
    server = make_server_role(config_of(protocol), tmp_path, tmp_path)
    assert type(site).__module__ == f"nightsplit.site_worker.protocols.{protocol}"
    assert type(server).__module__ == f"nightsplit.server_worker.protocols.{protocol}"


@pytest.mark.parametrize("side", ["site_worker", "server_worker"])
def test_a_file_for_each_system_at_each_side(side: str) -> None:
    sides = {path.stem for path in (ROOT / side / "protocols").glob("*.py")} - {"__init__"}
    assert sides == set(PROTOCOLS)
    for name in sides:
        role = import_module(f"nightsplit.{side}.protocols.{name}").ROLE
        assert role.__module__ == f"nightsplit.{side}.protocols.{name}"


BUILDERS = {"build_model", "build_split_model", "build_whole_model", "build_network", "build", "make", "stages_of"}
BEHIND_APPROVAL = {
    "site_worker/protocols/__init__.py",  # called by a SiteWorker, which checks
    "site_worker/predict.py", "site_worker/query_worker.py",  # given one, or with one of their own
    "console/doctor/checks.py", "console/doctor/links.py",  # behind the gates
    "console/explain_run.py",  # with a SiteWorker
    "console/pretrain.py",  # of the user's own pretrain.toml
}  # fmt: skip


def test_nothing_at_a_hospital_builds_a_model_before_its_approval() -> None:
    """Whoever adds a place that builds one has to see to its check, and adds it here."""
    modules = tuple(f"nightsplit.shared.{m}" for m in ("models.", "protocols.build.", "protocols.he_clstm."))
    found = {
        name_of(path)
        for path in files_of("site_worker", "console")
        for used in imports_of(parsed(path))
        if used.startswith(modules) and used.rpartition(".")[2] in BUILDERS
    }
    assert found == BEHIND_APPROVAL


def names_of_systems(tree: ast.AST) -> Iterator[str]:
    """Where code treats systems differently by their names: comparisons of `.protocol`, look-ups by it, literals."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare | ast.Match):
            parts = list(ast.iter_child_nodes(node))
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            parts = list(node.args)
        if any(isinstance(part, ast.Attribute) and part.attr == "protocol" for part in parts):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and node.value in PROTOCOLS:
            yield f"line {node.lineno}: {node.value!r}"


REGISTRY = {
    "shared/protocols/spec.py", "shared/protocols/load.py",
    "site_worker/protocols/__init__.py", "server_worker/protocols/__init__.py",
}  # fmt: skip
"""They find a system's spec and its roles by its name."""


def test_nothing_but_its_own_files_names_a_system() -> None:
    sides = ("shared", "site_worker", "server_worker")
    own = {f"{side}/protocols/{name}.py" for side in sides for name in PROTOCOLS}
    found = [
        f"{name_of(path)}, {where}"
        for path in SOURCE
        if name_of(path) not in own | REGISTRY
        for where in names_of_systems(parsed(path))
    ]
    assert not found, found
    for code in (
        'run.protocol == "x"',
        "run.protocol in ROUNDS",
        "T[a.run.protocol]",
        "T.get(run.protocol)",
        '"split_u"',
    ):
        assert list(names_of_systems(ast.parse(code))), code


def test_the_registry_needs_no_library_of_encrypted_queries() -> None:
    code = "import sys, nightsplit.site_worker.protocols, nightsplit.server_worker.protocols as p; p.ROLES; "
    code += "sys.exit('tenseal' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
