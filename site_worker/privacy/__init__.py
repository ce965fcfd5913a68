"""Differential privacy at the site: noise, accounting, and the ledger (docs/explanation/privacy.md)."""

import logging
from importlib.util import find_spec

from nightsplit.shared.config.run import PrivacySection
from nightsplit.shared.errors import RunError

# Opacus calls logging.basicConfig when it is imported, which would print our log a second time. It does nothing if
# the root logger has a handler.
logging.getLogger().addHandler(logging.NullHandler())


def check_installed() -> None:
    """Raise RunError 614 if packages of the extra are missing; the modules of this package import them."""
    missing = " and ".join(name for name in ("opacus", "dp_accounting") if find_spec(name) is None)
    if missing:
        raise RunError(614, f"{missing} cannot be imported.", "pip install nightsplit[privacy] at this site.")


def check_delta(privacy: PrivacySection, records: int) -> None:
    """Check delta against the number of the site's training records; RunError 616 above 1 / records.

    A mechanism that publishes one record at random has epsilon 0 and delta 1 / records.
    """
    if privacy.delta * records > 1.0:
        sentence = f"privacy.delta is {privacy.delta:g}, and 1 / {records} training records is {1 / records:.3g}."
        raise RunError(616, sentence, "agree on a new run with a delta well below that of the largest site.")
