"""Errors for users: a number, a sentence that says what happened, and a remedy.

NightsplitError
├── ConfigError     1xx  a file the user wrote, or a model that cannot be cut as configured
├── BrokerError     2xx  the message broker or the run store
│   └── MissingRightError     of a single operation
├── Refused         3xx  a message that the receiver does not apply; goes to the dead letter queue
├── DataError       4xx  a site's own data
├── StateError      5xx  checkpoints and local disks
└── RunError        6xx  sites and server disagree about the run

Each number has a title in `TITLES` and a page `docs/errors/<number>.md`, which `nightsplit explain <number>` prints; a
test keeps both complete.
"""

from typing_extensions import override

TITLES: dict[int, str] = {
    101: "Configuration file missing or unreadable",
    102: "Configuration file is not valid TOML",
    103: "Wrong, missing or unknown configuration key",
    104: "Model factory cannot be used",
    105: "Model cannot be cut there",
    106: "Shift is empty or unreadable",
    107: "Address cannot be used",
    108: "Policy forbids what the run asks",
    109: "Device is not available",
    110: "Example cannot be found",
    111: "Unencrypted connection to another host",
    112: "Metrics cannot be served at this address",
    113: "Certificate, key or password cannot be used",
    114: "Run cannot be divided among processes",
    115: "Model file cannot be read",
    116: "Model file has another hash",
    117: "Model file does not match the model",
    118: "Run is not approved",
    119: "Code of the model has changed",
    120: "Unknown error number",
    121: "Run without keys on several machines",
    122: "Worker's key is not that of the run",
    201: "Broker cannot be reached",
    202: "Broker refuses access",
    203: "Message is larger than the broker allows",
    204: "Queue exists with other settings",
    205: "Queue does not exist",
    207: "Run store cannot be reached",
    208: "Another worker already does this work",
    209: "Broker accepts no messages at present",
    210: "Dead letter queue is in use",
    211: "Access rights cannot be changed at broker or store",
    212: "Nodes of the cluster do not agree",
    213: "Version of the broker cannot be used",
    214: "Run is in use",
    301: "Not a nightsplit message",
    302: "Unknown wire version",
    303: "Unknown kind of message",
    304: "Message does not match its schema",
    305: "Tensor has a forbidden or unexpected dtype",
    306: "Tensor has an unexpected shape",
    307: "Value is not finite, or beyond its limits",
    308: "Message exceeds a limit",
    309: "Message is truncated or has extra bytes",
    310: "Message belongs to another run, sender or receiver",
    311: "Compressed body cannot be trusted",
    312: "Batch gives values that are not finite",
    313: "Ciphertext or public key cannot be used",
    314: "Public keys are unknown",
    315: "Query was begun by another server",
    316: "Message could not be applied",
    317: "Message cannot be verified",
    401: "Data file missing or unreadable",
    402: "Column is missing",
    403: "Value cannot be read",
    404: "Site has a single class",
    405: "Too few patients",
    406: "Image cannot be read",
    407: "Arrays do not match",
    408: "Data folder is not configured",
    409: "Data changed since the run began",
    410: "Text is burned into an image",
    411: "Compression cannot be decoded",
    412: "Mask does not match its image",
    501: "File cannot be written",
    502: "No valid checkpoint is left",
    503: "State directory is in use",
    504: "Site lost its state",
    505: "Another server took over the run",
    506: "State belongs to another run",
    507: "Run has no tape",
    508: "Tape is incomplete",
    509: "Another process of the server has ended",
    510: "Run store lost the run",
    511: "Secret key cannot be read",
    512: "Queries are not answered yet",
    513: "File or folder is accessible to other users",
    514: "Keys of the run are missing",
    515: "Exit log was changed",
    601: "Site and server were configured differently",
    602: "Site is not part of the run",
    603: "Training has diverged",
    604: "Server's layers were not exported",
    605: "Run is unknown",
    606: "No such dead letter",
    607: "Dead letter cannot be sent again",
    608: "Site was excluded",
    610: "Model cannot be trained with privacy",
    611: "Privacy budget is spent",
    612: "Privacy ledger cannot be used",
    613: "Run is in the ledger with other data or settings",
    614: "Packages for privacy are missing",
    615: "Package for encryption is missing",
    616: "Delta is too large for the site's records",
    617: "Exit log is shorter than before",
}


class NightsplitError(Exception):
    """Error with a number; `str()` is the line for the user.

    Args:
        number: key of `TITLES`.
        sentence: description of the case, with its names and figures.
        remedy: instruction to the user that resolves it.
    """

    def __init__(self, number: int, sentence: str, remedy: str) -> None:
        assert number in TITLES, f"error {number} has no title"
        super().__init__(number, sentence, remedy)
        self.number = number
        self.sentence = sentence
        self.remedy = remedy

    @property
    def heading(self) -> str:
        """Number and title, safe for all readers: the sentence may quote a path, a password or a patient."""
        return f"E{self.number} {TITLES[self.number]}"

    @override
    def __str__(self) -> str:
        return f"{self.heading}: {self.sentence} Fix: {self.remedy} (nightsplit explain {self.number})"


class ConfigError(NightsplitError):
    """Error in a file the user wrote, or in a model that it names."""


class BrokerError(NightsplitError):
    """Failure or refusal of the broker or the run store."""


class MissingRightError(BrokerError):
    """Refusal of a single operation to a user who is logged in."""


class Refused(NightsplitError):  # noqa: N818  (it is a message that was refused, and no error of a program)
    """Refusal of a message, which goes to the dead letter queue with this text."""


class DataError(NightsplitError):
    """Error in a site's data."""


class StateError(NightsplitError):
    """Failure of a checkpoint, a lock or a disk that makes further work unsafe."""


class RunError(NightsplitError):
    """Disagreement between participants of a run, or another reason that ends it."""


def mismatch(sentence: str, number: int = 304) -> Refused:
    """Return the refusal of a message that no worker of the same version and run would send."""
    return Refused(number, sentence, "run the same version of nightsplit, with the same run.toml, at both sides.")
