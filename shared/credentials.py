"""Credentials of a worker at broker and store, and the encryption of its connections.

Every connection to another machine uses TLS 1.2 or newer and verifies the other side's certificate;
`nightsplit.shared.address` allows an unencrypted one only to this machine.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

from nightsplit.shared.errors import ConfigError


@dataclass(frozen=True)
class Credentials:
    """Files of a worker from `nightsplit keys`.

    Attributes:
        ca: certificate of the CA that signed the other side's; None for the system's CAs.
        certificate, key: this worker's own.
        password: file with the password for broker and store, which an address then need not contain.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    password: Path | None = None

    def tls(self) -> ssl.SSLContext:
        """Return a client's context: TLS 1.2 or newer, the server verified; ConfigError 113 if a file is unusable."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            sentence = f"{files}: {error.strerror or error}."
            raise ConfigError(113, sentence, "set ca, certificate and key to the files you were given.") from None
        return context

    def secret(self) -> str | None:
        """Return the password without its newline, or None; ConfigError 113 if its file cannot be read."""
        if self.password is None:
            return None
        try:
            return self.password.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text"
            raise ConfigError(113, f"{self.password}: {reason}.", "set password to the file you were given.") from None


NO_CREDENTIALS = Credentials()
"""Credentials without files: an address may still contain a password."""
