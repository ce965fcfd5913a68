"""Homomorphic encryption on both sides: parameters, packing, weights. Needs the extra `he`."""

from importlib.util import find_spec

from nightsplit.shared.errors import RunError


def check_installed() -> None:
    """Raise RunError 615 if the package of the extra is missing."""
    if find_spec("tenseal") is None:
        raise RunError(615, "TenSEAL cannot be imported.", "pip install nightsplit[he].")
