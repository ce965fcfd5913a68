"""Queue arguments for RabbitMQ, and errors from its replies.

Errors are recognised by their attributes, so that pika itself is not needed here.
"""

import re
from typing import Any

from nightsplit.shared.errors import BrokerError, MissingRightError
from nightsplit.shared.transport import Queue

NO_DELIVERY_LIMIT = 2**31 - 1
"""Delivery limit of a quorum queue that amounts to none. RabbitMQ's own value for none, -1, is right from RabbitMQ 4
on; RabbitMQ 3 accepts it, and dead-letters every message at its first redelivery."""


CONSUMER_UNREACHABLE_MS = 10_000
"""Milliseconds that a quorum queue keeps deliveries for a consumer at a node that is out of reach. RabbitMQ 4.3 keeps
them for a minute by default, and gives the next consumer nothing meanwhile; earlier versions do not wait."""


def arguments(queue: Queue, quorum: bool) -> dict[str, object]:
    """Return the arguments of a queue. Lazy mode is left to a policy, since a broker may refuse other arguments.

    The type is always named: a virtual host may have a default, and RabbitMQ 4's quorum queues drop
    messages after 20 deliveries unless they are configured otherwise.
    """
    arguments: dict[str, object] = {"x-single-active-consumer": True, "x-queue-type": "classic"}
    if quorum:
        arguments |= {"x-queue-type": "quorum", "x-delivery-limit": NO_DELIVERY_LIMIT}
        arguments["x-consumer-disconnected-timeout"] = CONSUMER_UNREACHABLE_MS
    if queue.limit_bytes is not None:
        # The default on overflow is to drop the oldest message, and confirm the new one.
        arguments |= {"x-max-length-bytes": queue.limit_bytes, "x-overflow": "reject-publish"}
    if queue.dead is not None:
        arguments |= {"x-dead-letter-exchange": queue.dead.exchange, "x-dead-letter-routing-key": queue.dead.key}
    return arguments


def _innermost(error: BaseException) -> BaseException:
    """Return the cause inside pika's nested errors of a failed connection."""
    while True:
        inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None), *error.args[:1]]
        causes = [cause for cause in inner if isinstance(cause, BaseException)]
        if not causes:
            return error
        error = causes[-1]


def _reply(error: BaseException | None) -> tuple[int | None, str]:
    """Return the broker's reply code, None where there is none, and the text without a full stop."""
    if error is None:
        return None, "no answer"
    inner = _innermost(error)
    # While a connection opens, pika turns the broker's answer into a text.
    reply = re.search(r"ConnectionClosedByBroker: \((\d+)\) ['\"](.*)['\"]", str(inner))
    if reply:
        return int(reply[1]), reply[2].rstrip(".")
    text = getattr(inner, "reply_text", "") or str(inner) or type(inner).__name__
    return getattr(inner, "reply_code", None), text.rstrip(".")


def is_of_other_type(refusal: BaseException | None) -> bool:
    """Return whether the broker refused to declare a queue because it exists with another type."""
    return "inequivalent arg 'x-queue-type'" in _reply(refusal)[1]


def permanent_error(error: BaseException, parameters: Any) -> BrokerError | None:
    """Return the error to report when retrying cannot help; None when it may."""
    if isinstance(error, BrokerError):
        return error
    code, text = _reply(error)
    sentence = f"{_address(parameters)} says: {text}."
    # "write access to queue 'q' in vhost 'v' refused"; RabbitMQ 3 does not name the right.
    if code == 403 and (missing := re.search(r"(\w+ )?access to (\w+ '.*?') in vhost", text)):
        sentence = f"{_address(parameters)}: the user lacks the {missing[1] or ''}right on {missing[2]}."
        fix = "give it the rights that nightsplit keys writes; nightsplit keys init brings an older centre up to date."
        return MissingRightError(202, sentence, fix)
    if code in (403, 530):
        return BrokerError(202, sentence, "check user, password and virtual host.")
    if code == 404 and "inaccessible" not in text:  # a cluster's node that is down comes back
        return BrokerError(205, sentence, "open the run first: nightsplit open server.toml.")
    if code == 406 and "inequivalent" in text:
        return BrokerError(204, f"{text}.", "use the run's original limits, or another run id.")
    if code == 406 and "larger than" in text:
        return BrokerError(203, f"{text}.", "lower run.batch_size, or raise max_message_size at the broker.")
    return None


def split_cluster(queue: Queue, parameters: Any) -> BrokerError:
    """Return the error for a cluster with nodes that have lost contact."""
    sentence = f"{_address(parameters)} does not know queue {queue.name}, which another node has."
    fix = "restart the node that was frozen or cut off; rabbitmqctl cluster_status names it."
    return BrokerError(212, sentence, fix)


def unreachable(error: BaseException | None, parameters: Any) -> BrokerError:
    """Return the error for a broker that does not answer."""
    sentence = f"{_address(parameters)}: {_reply(error)[1]}."
    return BrokerError(201, sentence, "start the broker, or correct host and port in the address.")


def connection_lost(error: BaseException | None, parameters: Any) -> str:
    """Return the reason that is shown to the user while the link reconnects."""
    cause = "no heartbeat" if type(error).__name__ == "AMQPHeartbeatTimeout" else _reply(error)[1]
    host = f"{parameters.host}:{parameters.port}"
    return f"the connection to the broker is lost ({host}: {cause}); trying again, nothing is lost"


def _address(parameters: Any) -> str:
    """Return the broker's address without the password."""
    user = getattr(parameters.credentials, "username", "")
    return f"{user}@{parameters.host}:{parameters.port}, virtual host {parameters.virtual_host}"
