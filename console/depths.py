"""Depths of queues, as far as a user may see them."""

from collections.abc import Iterable

from nightsplit.shared.errors import MissingRightError
from nightsplit.shared.transport import Broker, Queue


def read_depths(broker: Broker, queues: Iterable[Queue]) -> tuple[dict[str, int | None], MissingRightError | None]:
    """Return the depth of each queue by its name, None for one that does not exist, and an error for all unseen ones.

    Raises:
        BrokerError: 201 the broker cannot be reached, 202 it refuses the login.
    """
    depths: dict[str, int | None] = {}
    refusals: list[MissingRightError] = []
    for queue in queues:
        try:
            depths[queue.name] = broker.depth(queue)
        except MissingRightError as refusal:
            refusals.append(refusal)
    if not refusals:
        return depths, None
    sentences = " ".join(refusal.sentence for refusal in refusals)
    return depths, MissingRightError(202, sentences, refusals[0].remedy)
