"""Differential privacy at the site: noise, accounting, and the ledger (docs/explanation/privacy.md)."""

import logging
from importlib.util import find_spec

from nightsplit.shared.errors import RunError

# Opacus calls logging.basicConfig when it is imported, which would print our log a second time. It does nothing if
# the root logger has a handler.
logging.getLogger().addHandler(logging.NullHandler())


def check_installed() -> None:
    """Raise RunError 614 if packages of the extra are missing; the modules of this package import them."""
    missing = " and ".join(name for name in ("opacus", "dp_accounting") if find_spec(name) is None)
    if missing:
        raise RunError(614, f"{missing} cannot be imported.", "pip install nightsplit[privacy] at this site.")
