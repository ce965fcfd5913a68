"""Interface of a protocol to the client of encrypted queries: encrypt a step, decrypt its answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from nightsplit.shared.he.weights import FloatArray
from nightsplit.site_worker.query.store import Query


class QueryRole(ABC):
    """The site's side of a Query protocol."""

    steps: int
    """Messages of a query to the server."""

    @abstractmethod
    def packing_for(self, sequences: int) -> tuple[str, int]:
        """Return the name of the packing for this number of sequences, and its capacity in sequences."""

    @abstractmethod
    def encrypt_step(self, query: Query) -> list[bytes]:
        """Encrypt the query's present step."""

    @abstractmethod
    def decrypt_state(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        """Return the blinded state for the next step: h, c and votes, float64; raises as `decrypt_logits`."""

    @abstractmethod
    def decrypt_logits(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        """Return the scores of the sequences, float64 (n,).

        Raises:
            Refused: 304, 313 the answer is invalid.
        """
