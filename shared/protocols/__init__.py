"""The contracts of the systems: payloads, settings, paper. Each has a side at the site and one at the server.

A module of this package with a `SPEC` is a system; nothing lists them.
"""

from importlib import import_module
from pkgutil import iter_modules

from nightsplit.shared.protocols.spec import PROTOCOLS

for _name in sorted(_module.name for _module in iter_modules(__path__)):
    if (_spec := getattr(import_module(f"{__name__}.{_name}"), "SPEC", None)) is not None:
        if _spec.name != _name:
            raise ImportError(f"{__name__}.{_name} describes {_spec.name!r}: let file and system have one name")
        PROTOCOLS[_name] = _spec
