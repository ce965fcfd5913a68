"""The actions of nightsplit keys: change the files, then tell broker and store if they run."""

import re
from collections.abc import Sequence
from pathlib import Path

from nightsplit.console.keys.bundle import BROKER_PORT, MANAGEMENT_PORT, STORE_PORT, Addresses, Keys, with_port
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.foreign import shown


def init(folder: Path, broker: str, store: str, management: str | None) -> int:
    """Make a folder of keys; harmless where there is one."""
    management = with_port(management or re.split("[:,]", broker)[0], MANAGEMENT_PORT)
    if Keys(folder).init(Addresses(with_port(broker, BROKER_PORT), management, with_port(store, STORE_PORT))):
        print(f"made {folder}: authority, centre and the server's keys. Keep {folder}/authority off every worker.")
    else:
        print(f"{folder} has its keys; nothing is changed")
    return 0


def new_sites(folder: Path, names: Sequence[str]) -> int:
    """Make what each hospital gets, and let them in."""
    keys = Keys(folder)
    for name in names:
        handed = keys.new_site(name)
        if handed is None:
            print(f"{name} has its keys; nothing is changed")
        else:
            print(f"made {handed}: hand it to {name} by a way that you trust, then delete it here")
    live = keys.live()
    for tell, service in ((live.tell_broker, "broker"), (live.tell_store, "store")):
        try:
            tell()
        except BrokerError as error:
            print(f"the {service} learns of it when it starts ({shown(error.sentence)})")
        else:
            print(f"the {service} knows {', '.join(names)}")
    return 0


def revoke(folder: Path, name: str) -> int:
    """Shut a site out, now. Raises BrokerError 211 when broker or store could not be told."""
    keys = Keys(folder)
    keys.revoke(name)
    live = keys.live()
    try:
        live.tell_store()
    finally:
        live.tell_broker()
    print(f"{name} is shut out of broker and store, and its connections are closed")
    return 0
