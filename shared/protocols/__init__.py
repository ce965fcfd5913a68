"""Specifications of the protocols. Each has a role at the site and one at the server.

Every module of this package with a `SPEC` is a protocol; there is no other list.
"""

from importlib import import_module
from pkgutil import iter_modules

from nightsplit.shared.protocols.spec import PROTOCOLS

for _name in sorted(_module.name for _module in iter_modules(__path__)):
    if (_spec := getattr(import_module(f"{__name__}.{_name}"), "SPEC", None)) is not None:
        if _spec.name != _name:
            raise ImportError(f"{__name__}.{_name} specifies {_spec.name!r}: give file and protocol the same name")
        PROTOCOLS[_name] = _spec
