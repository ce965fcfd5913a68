"""What RabbitMQ is told about a queue, and what its answers mean as errors.

Errors are recognised by what they carry, so that pika itself is not needed here.
"""

import re
from typing import Any

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Queue

NO_DELIVERY_LIMIT = 2**31 - 1
"""For a quorum queue, as good as none. Its own word for none, -1, is unknown to RabbitMQ 3, and lets
RabbitMQ 4 put redelivered messages behind all others."""


def arguments(queue: Queue, replicated: bool) -> dict[str, object]:
    """Queue arguments. Lazy mode is left to a policy, since brokers may refuse arguments that differ.

    The type is always named: a virtual host may have a default, and RabbitMQ 4's quorum queues drop
    what was delivered 20 times, unless they are told otherwise.
    """
    arguments: dict[str, object] = {"x-single-active-consumer": True, "x-queue-type": "classic"}
    if replicated:
        arguments |= {"x-queue-type": "quorum", "x-delivery-limit": NO_DELIVERY_LIMIT}
    if queue.limit_bytes is not None:
        # The default on overflow is to drop the oldest message, and confirm the new one.
        arguments |= {"x-max-length-bytes": queue.limit_bytes, "x-overflow": "reject-publish"}
    if queue.dead_key is not None:
        arguments |= {"x-dead-letter-exchange": queue.exchange, "x-dead-letter-routing-key": queue.dead_key}
    return arguments


def _innermost(error: BaseException) -> BaseException:
    """The cause inside pika's nested reports of a failed connection."""
    while True:
        inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None), *error.args[:1]]
        causes = [cause for cause in inner if isinstance(cause, BaseException)]
        if not causes:
            return error
        error = causes[-1]


def _said(error: BaseException | None) -> tuple[int | None, str]:
    """The broker's reply code, where it gave one, and what happened."""
    if error is None:
        return None, "no answer"
    inner = _innermost(error)
    # While a connection opens, pika turns the broker's answer into a text.
    told = re.search(r"ConnectionClosedByBroker: \((\d+)\) ['\"](.*)['\"]", str(inner))
    if told:
        return int(told[1]), told[2].rstrip(".")
    text = getattr(inner, "reply_text", "") or str(inner) or type(inner).__name__
    return getattr(inner, "reply_code", None), text.rstrip(".")


def sentence(error: BaseException | None) -> str:
    """What happened, in the broker's words where it gave any; without a full stop."""
    return _said(error)[1]


def permanent_error(error: BaseException, parameters: Any) -> BrokerError | None:
    """The error to report for what trying again cannot mend; None for what it may."""
    code, said = _said(error)
    if code in (403, 530):
        return BrokerError(
            202,
            f"{_place(parameters)} says: {said}.",
            "check user, password and virtual host, and the user's permissions at the broker.",
        )
    if code == 404 and "inaccessible" not in said:  # a cluster's node that is down comes back
        return missing_queue(f"{_place(parameters)} says: {said}.")
    if code == 406 and "inequivalent" in said:
        return BrokerError(204, f"{said}.", "use the run's original limits, or another run id.")
    if code == 406 and "larger than" in said:
        return BrokerError(203, f"{said}.", "lower run.batch_size, or raise max_message_size at the broker.")
    return None


def missing_queue(what: str) -> BrokerError:
    """The error for a queue or exchange that does not exist."""
    return BrokerError(205, what, "open the run first: nightsplit open server.toml.")


def split_cluster(queue: Queue, parameters: Any) -> BrokerError:
    """The error for a cluster whose nodes have lost sight of each other."""
    return BrokerError(
        212,
        f"{_place(parameters)} does not know queue {queue.name}, which another node has.",
        "restart the node that was frozen or cut off; rabbitmqctl cluster_status names it.",
    )


def unreachable(error: BaseException | None, parameters: Any) -> BrokerError:
    """The error for a broker that does not answer at all."""
    return BrokerError(
        201, f"{_place(parameters)}: {sentence(error)}.", "start the broker, or correct host and port in the address."
    )


def connection_lost(error: BaseException | None, parameters: Any) -> str:
    """What a worker's user reads while the link tries again."""
    what = "nothing was heard from it" if type(error).__name__ == "AMQPHeartbeatTimeout" else sentence(error)
    place = f"{parameters.host}:{parameters.port}"
    return f"the connection to the broker is lost ({place}: {what}); trying again, nothing is lost"


def _place(parameters: Any) -> str:
    """The broker's address without the password."""
    user = getattr(parameters.credentials, "username", "")
    return f"{user}@{parameters.host}:{parameters.port}, virtual host {parameters.virtual_host}"
