"""Co-signature of an exit log: the server's statement that a site's log had this head when it had so many lines.

Of the idea of witnesses for transparency logs (C2SP tlog-cosignature): whoever cuts lines off afterwards has a shorter
log than the one that was signed.
"""

from nightsplit.shared.trust.identity import Identity, PublicKey

_DOMAIN = "nightsplit-exit-log-1"


def cosign(identity: Identity, digest: str, site: str, lines: int, head: str) -> str:
    """Return the signature, in hexadecimal, of a run's server over the head of a site's log."""
    return identity.sign(_statement(digest, site, lines, head)).hex()


def is_cosigned(server: PublicKey, signature: str, digest: str, site: str, lines: int, head: str) -> bool:
    """Return whether the server has signed this head."""
    try:
        return server.verifies(bytes.fromhex(signature), _statement(digest, site, lines, head))
    except ValueError:
        return False


def _statement(digest: str, site: str, lines: int, head: str) -> bytes:
    return "\0".join((_DOMAIN, digest, site, str(lines), head)).encode()
