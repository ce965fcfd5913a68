"""nightsplit keys: certificates and accounts. A verb changes the files, then updates a running broker and store."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from nightsplit.console.options import print_help_alone
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.foreign import shown

keys = typer.Typer(
    callback=print_help_alone,
    invoke_without_command=True,
    help="""Create and revoke the sites' certificates and accounts.

    At the coordinating centre: create certificates, users and permissions for the broker, the run store, the
    server and each site. docs/how-to/deployment.md explains how to use them.
    """,
)

if TYPE_CHECKING:
    from nightsplit.console.keys.bundle import Keys

Folder = Annotated[Path, Option("--folder", metavar="FOLDER", help="folder of the keys")]
KEYS = Path("keys")


@keys.command()
def init(
    broker: Annotated[str, Option(metavar="HOST[:PORT]", help="address of RabbitMQ for the sites (default port 5671)")],
    store: Annotated[str, Option(metavar="HOST[:PORT]", help="address of Redis for the sites (default port 6379)")],
    management: Annotated[
        str | None,
        Option(metavar="HOST[:PORT]", help="RabbitMQ's management (default: host of the broker, port 15671)"),
    ] = None,
    folder: Folder = KEYS,
) -> None:
    """Create a folder of keys, or bring an older one up to date.

    Create an authority, the keys and configuration of RabbitMQ and Redis, and the keys of the server. In a folder that
    has them, no key is changed: configuration and permissions become those of this version.
    """
    from nightsplit.console.keys.bundle import BROKER_PORT, MANAGEMENT_PORT, STORE_PORT, Addresses, Keys, with_port

    first_host = re.sub(r"(:\d+)?(,.*)?$", "", broker)
    management = with_port(management or first_host, MANAGEMENT_PORT)
    bundle = Keys(folder)
    if bundle.init(Addresses(with_port(broker, BROKER_PORT), management, with_port(store, STORE_PORT))):
        print(f"made {folder}: authority, centre and the server's keys. Keep {folder}/authority off every worker.")
    elif changed := bundle.update():
        files = ", ".join(changed)
        print(f"{folder} already has its keys; brought up to date in {folder}/centre: {files} (before: FILE.old)")
        _update_services(bundle, has="has the permissions of this version", takes="takes them")
        if any(file.endswith(".conf") for file in changed):
            print("restart RabbitMQ and Redis: they read their configuration when they start")
    else:
        print(f"{folder} already has its keys; nothing is changed")


@keys.command()
def new_site(
    names: Annotated[list[str], Argument(metavar="NAME", help="the site's name, as in run.sites")],
    folder: Folder = KEYS,
) -> None:
    """Add a hospital.

    Create the folder for a hospital, and an account with permissions for its own queues only.
    """
    from nightsplit.console.keys.bundle import Keys

    bundle = Keys(folder)
    for name in names:
        handed = bundle.new_site(name)
        if handed is None:
            print(f"{name} already has its keys; nothing is changed")
        else:
            print(f"made {handed}: hand it to {name} in a way that you trust, then delete it here")
    _update_services(bundle, has=f"has the account of {', '.join(names)}", takes="adds the account")


@keys.command()
def revoke(name: Annotated[str, Argument(metavar="NAME", help="the site's name")], folder: Folder = KEYS) -> None:
    """Revoke a hospital's access.

    Remove a site's account and close its connections, at once.
    """
    from nightsplit.console.keys.bundle import Keys

    bundle = Keys(folder)
    bundle.revoke(name)
    services = bundle.services()
    try:
        services.update_store()
    finally:
        services.update_broker()
    print(f"{name} has no access to broker and store, and its connections are closed")


def _update_services(bundle: "Keys", has: str, takes: str) -> None:
    """Update broker and store, and say which of them has the change, and which takes it only when it starts."""
    services = bundle.services()
    for update, service in ((services.update_broker, "broker"), (services.update_store, "store")):
        try:
            update()
        except BrokerError as error:
            print(f"the {service} {takes} when it starts ({shown(error.sentence)})")
        else:
            print(f"the {service} {has}")
