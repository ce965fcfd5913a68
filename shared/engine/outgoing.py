"""Messages on their way out of one worker: published, repeated for a receiver that lacks them, and confirmed."""

from nightsplit.shared.engine.effects import Again, Release, Send
from nightsplit.shared.engine.fencing import CheckpointAuthority
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.pending import UnconfirmedSends
from nightsplit.shared.engine.role import Role
from nightsplit.shared.wire.message import Message


class Outgoing:
    """Sends of a role over its mailbox.

    A message that is asked for again comes from the role if it rederives, else from the messages that the mailbox
    keeps; in both cases it equals its first copy.

    Args:
        unconfirmed_max: number of unconfirmed messages at which no more should be sent.
    """

    def __init__(self, role: Role, mailbox: Mailbox, authority: CheckpointAuthority, unconfirmed_max: int) -> None:
        self._role, self._mailbox, self._authority = role, mailbox, authority
        self._unconfirmed_max = unconfirmed_max
        self.unconfirmed = UnconfirmedSends()
        self._again: dict[tuple[str, int], None] = {}
        """Receiver and seq of the messages to send again, in their order."""

    @property
    def is_ahead(self) -> bool:
        """True when no more should be sent: if the oldest unconfirmed one is lost, later ones could fill a prefetch."""
        return self.unconfirmed.is_ahead(self._unconfirmed_max)

    def perform(self, effect: Send | Again | Release) -> None:
        """Publish a message, note messages to be sent again, or keep none that is released."""
        match effect:
            case Send():
                self._send(effect)
            case Again(receiver, seqs):
                self._again.update(dict.fromkeys((receiver, seq) for seq in seqs))
            case Release(receiver, last):
                self._mailbox.release(receiver, last)

    @property
    def has_repeats(self) -> bool:
        """True while messages are to be sent again."""
        return bool(self._again)

    def repeat(self) -> bool:
        """Send one of these messages, unless too many are unconfirmed; return whether there was one."""
        if not self._again or self.is_ahead:
            return False
        receiver, seq = next(iter(self._again))
        del self._again[receiver, seq]
        if self._role.rederives:
            if (send := self._role.repeat(seq)) is not None:
                self._send(send)
        elif (message_id := self._mailbox.send_kept(receiver, seq)) is not None:
            self.unconfirmed.add(message_id, receiver, seq)
        return True

    def _send(self, send: Send) -> None:
        fence = self._authority.fence
        header = self._mailbox.header(send.receiver, send.kind, send.seq, send.reply_to, send.version, fence)
        message_id = self._mailbox.send(Message(header, send.tensors, send.scalars))
        if send.seq:
            self.unconfirmed.add(message_id, send.receiver, send.seq)
