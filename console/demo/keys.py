"""Keys of a run with all workers on this computer: identities, public keys in run.toml, and seeds of the sites.

The seeds are a function of the sites' names, so that the demo ends with the same weights everywhere. The worker of a
hospital makes its own at random.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from nightsplit.shared.config.load import load
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.storage.files import make_private_folder, write_new
from nightsplit.shared.trust.identity import Identity, make_identity
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.worker import SEED


def give_keys(folder: Path, make: Callable[[Path], Identity] = make_identity) -> None:
    """Make an identity for every worker of the run in `folder`, and write their keys into the files there."""
    lines = ["[parties]"]
    for worker in (SERVER, *load_run(folder / "run.toml").run.sites):
        public = make(folder / f"{worker}.identity").public
        lines.append(f'{worker} = "{public.text}"')
        file = folder / f"{worker}.toml"
        text = file.read_text(encoding="utf-8")
        own = rf'\1\nidentity = "{worker}.identity"'
        file.write_text(re.sub(r"^(\[(?:site|server)\].*)$", own, text, count=1, flags=re.MULTILINE), encoding="utf-8")
    with (folder / "run.toml").open("a", encoding="utf-8") as run:
        run.write("\n" + "\n".join(lines) + "\n")


def give_seeds(folder: Path) -> None:
    """Give every site of the run in `folder` the seed that follows from its name."""
    for site in load_run(folder / "run.toml").run.sites:
        state = folder / load(folder / f"{site}.toml", SiteConfig).site.state
        make_private_folder(state)
        write_new(state / SEED, hashlib.sha256(f"demo of {site}".encode()).digest())
