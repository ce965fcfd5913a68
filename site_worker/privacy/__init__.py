"""Differential privacy at the site: noise, accounting, the ledger of what was spent (docs/explanation/privacy.md)."""

import logging
from importlib.util import find_spec

from nightsplit.shared.errors import RunError

# Opacus calls logging.basicConfig when it is imported, which does nothing where the root has a handler:
# our log would be printed a second time.
logging.getLogger().addHandler(logging.NullHandler())


def check_installed() -> None:
    """Raise RunError 614 where packages of the extra are missing; everything else in this package imports them."""
    missing = " and ".join(name for name in ("opacus", "dp_accounting") if find_spec(name) is None)
    if missing:
        raise RunError(614, f"{missing} cannot be imported.", "pip install nightsplit[privacy] at this site.")
