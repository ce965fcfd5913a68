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
    help="""Create and revoke identities, certificates and accounts.

    At a hospital: make its own keys, and a request. At the coordinating centre: create certificates, users and
    permissions for the broker, the run store, the server and each site. docs/how-to/deployment.md explains how to use
    them.
    """,
)

if TYPE_CHECKING:
    from nightsplit.console.keys.bundle import Keys

Folder = Annotated[Path, Option("--folder", metavar="FOLDER", help="folder of the keys")]
Requests = Annotated[list[Path], Argument(metavar="NAME.request", help="made by the hospital with keys request")]
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
def request(
    name: Annotated[str, Argument(metavar="NAME", help="the site's name, as in run.sites")],
    folder: Annotated[
        Path | None, Option("--folder", metavar="FOLDER", help="folder of the keys (default: NAME)")
    ] = None,
) -> None:
    """Make a hospital's own keys, and a request for the centre.

    At the hospital: make the identity that signs its messages and the key of its connections, which never leave it,
    and a file for the centre. Repeat it to have the certificate renewed.
    """
    from nightsplit.console.keys.request import make_request, read_request
    from nightsplit.shared.trust.identity import PublicKey

    file = make_request(folder or Path(name), name)
    print(f"made {file}: send it to the centre, and read these words to it by telephone")
    print(PublicKey(read_request(file).identity).words)


@keys.command()
def new_site(requests: Requests, folder: Folder = KEYS) -> None:
    """Admit a hospital by its request.

    Sign its certificate, and create an account with permissions for its own queues only.
    """
    from nightsplit.console.keys.bundle import Keys
    from nightsplit.console.keys.request import read_request
    from nightsplit.shared.trust.identity import PublicKey

    bundle, names = Keys(folder), []
    for file in requests:
        wanted = read_request(file)
        handed = bundle.new_site(wanted)
        names.append(wanted.name)
        if handed is None:
            print(f"{wanted.name} already has its keys; nothing is changed")
        else:
            print(f"{wanted.name} is {PublicKey(wanted.identity).words}: compare these words by telephone")
            print(f"made {handed}: hand it to {wanted.name} in a way that you trust, then delete it here")
    _update_services(bundle, has=f"has the account of {', '.join(names)}", takes="adds the account")


@keys.command()
def renew(requests: Requests, folder: Folder = KEYS) -> None:
    """Sign new certificates for hospitals that are admitted."""
    from nightsplit.console.keys.bundle import Keys
    from nightsplit.console.keys.request import read_request

    bundle = Keys(folder)
    for file in requests:
        wanted = read_request(file)
        print(f"made {bundle.renew(wanted)}: hand it to {wanted.name}, in place of its old one")


@keys.command()
def parties(folder: Folder = KEYS) -> None:
    """Print the public keys of server and sites, as run.toml holds them."""
    from nightsplit.console.keys.bundle import Keys

    print("[parties]")
    for name, key in Keys(folder).parties().items():
        print(f'{name} = "{key}"')


@keys.command()
def show(
    file: Annotated[Path, Argument(metavar="FILE", help="a run.toml, or a hospital's request")],
) -> None:
    """Spell the public keys in a file, to be compared by telephone."""
    from nightsplit.console.keys.request import read_request
    from nightsplit.shared.protocols.load import load_run
    from nightsplit.shared.trust.identity import PublicKey

    if file.suffix == ".request":
        wanted = read_request(file)
        found = {wanted.name: wanted.identity}
    else:
        found = load_run(file).parties
    for name, key in found.items():
        print(f"{name:<20} {PublicKey(key).words}   {key}")


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
