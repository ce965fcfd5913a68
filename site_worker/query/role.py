"""What the client of encrypted queries asks of a system: to encrypt a step, and to read what came back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from nightsplit.shared.he.weights import FloatArray
from nightsplit.site_worker.query.store import Query


class QueryRole(ABC):
    """The site's side of a Query system."""

    steps: int
    """Messages to the server that a query takes."""

    @abstractmethod
    def packing_for(self, sequences: int) -> tuple[str, int]:
        """Name the packing that suits so many sequences, and how many of them it takes at once."""

    @abstractmethod
    def pieces(self, query: Query) -> list[bytes]:
        """Encrypt the query's present step."""

    @abstractmethod
    def state(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        """Return what the server needs back, blinded by it: h, c and votes, float64; raises as `logits`."""

    @abstractmethod
    def logits(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        """Return the scores of the sequences, float64 (n,).

        Raises:
            Refused: 304, 313 the answer is none.
        """
