"""Keys for a run whose workers are all on this computer: an identity for each, and their public keys in run.toml."""

import re
from pathlib import Path

from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.trust.identity import make_identity
from nightsplit.shared.wire.message import SERVER


def give_keys(folder: Path) -> None:
    """Create an identity for every worker of the run in `folder`, and write their keys into the files there."""
    lines = ["[parties]"]
    for worker in (SERVER, *load_run(folder / "run.toml").run.sites):
        public = make_identity(folder / f"{worker}.identity").public
        lines.append(f'{worker} = "{public.text}"')
        file = folder / f"{worker}.toml"
        text = file.read_text(encoding="utf-8")
        own = rf'\1\nidentity = "{worker}.identity"'
        file.write_text(re.sub(r"^(\[(?:site|server)\].*)$", own, text, count=1, flags=re.MULTILINE), encoding="utf-8")
    with (folder / "run.toml").open("a", encoding="utf-8") as run:
        run.write("\n" + "\n".join(lines) + "\n")
