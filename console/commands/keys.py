"""nightsplit keys: who may take part. A verb changes the files, then tells broker and store if they run."""

import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nightsplit.console.options import print_help_alone
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.foreign import shown

keys = typer.Typer(
    callback=print_help_alone,
    invoke_without_command=True,
    help="""Create and revoke the sites' certificates and accounts.

    At the coordinating centre: make certificates, users and rights for the broker, the run store, the server
    and each site. docs/how-to/deployment.md tells how they are used.
    """,
)

Folder = Annotated[Path, Option("--folder", metavar="FOLDER", help="where keys are")]
KEYS = Path("keys")


@keys.command()
def init(
    broker: Annotated[str, Option(metavar="HOST[:PORT]", help="where sites reach RabbitMQ (port 5671 unless named)")],
    store: Annotated[str, Option(metavar="HOST[:PORT]", help="where sites reach Redis (port 6379 unless named)")],
    management: Annotated[
        str | None, Option(metavar="HOST[:PORT]", help="its management (broker's host, port 15671)")
    ] = None,
    folder: Folder = KEYS,
) -> None:
    """Make a folder of keys, once at the beginning.

    Make an authority, the keys and configuration of RabbitMQ and Redis, and the keys of the server. Where they
    are there, nothing is changed.
    """
    from nightsplit.console.keys.bundle import BROKER_PORT, MANAGEMENT_PORT, STORE_PORT, Addresses, Keys, with_port

    management = with_port(management or re.split("[:,]", broker)[0], MANAGEMENT_PORT)
    if Keys(folder).init(Addresses(with_port(broker, BROKER_PORT), management, with_port(store, STORE_PORT))):
        print(f"made {folder}: authority, centre and the server's keys. Keep {folder}/authority off every worker.")
    else:
        print(f"{folder} has its keys; nothing is changed")


@keys.command()
def new_site(
    names: Annotated[list[str], Argument(metavar="NAME", help="the site's name, as in run.sites")],
    folder: Folder = KEYS,
) -> None:
    """Let a hospital in.

    Make the folder to hand to a hospital, and let it log in with rights on its own queues alone.
    """
    from nightsplit.console.keys.bundle import Keys

    bundle = Keys(folder)
    for name in names:
        handed = bundle.new_site(name)
        if handed is None:
            print(f"{name} has its keys; nothing is changed")
        else:
            print(f"made {handed}: hand it to {name} by a way that you trust, then delete it here")
    live = bundle.live()
    for tell, service in ((live.tell_broker, "broker"), (live.tell_store, "store")):
        try:
            tell()
        except BrokerError as error:
            print(f"the {service} learns of it when it starts ({shown(error.sentence)})")
        else:
            print(f"the {service} knows {', '.join(names)}")


@keys.command()
def revoke(name: Annotated[str, Argument(metavar="NAME", help="the site's name")], folder: Folder = KEYS) -> None:
    """Shut a hospital out.

    Take a site's rights away and close its connections, at once.
    """
    from nightsplit.console.keys.bundle import Keys

    bundle = Keys(folder)
    bundle.revoke(name)
    live = bundle.live()
    try:
        live.tell_store()
    finally:
        live.tell_broker()
    print(f"{name} is shut out of broker and store, and its connections are closed")
