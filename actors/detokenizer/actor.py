"""Consumes Opened, Rejected, Sampled, PromptScored, Embedded, StatusChanged, Ended. Produces mail, and Stopped."""

from typing import NoReturn, assert_never

from triode.actors.channels import Inbox, Put
from triode.actors.detokenizer.batch import Detokenizer
from triode.actors.mailbox import MailboxRegistry
from triode.actors.messages import (
    DetokenizerInbox,
    Embedded,
    Ended,
    Opened,
    PromptScored,
    Rejected,
    Sampled,
    StatusChanged,
    Stopped,
)


async def run_detokenizer(
    core: Detokenizer, inbox: Inbox[DetokenizerInbox], scheduler: Put[Stopped], mailboxes: MailboxRegistry
) -> NoReturn:
    """Read steps for ever. Each reader wakes once for everything that came in together."""
    while True:
        for message in await inbox.take():
            _handle(message, core, scheduler, mailboxes)
        mailboxes.flush()


def _handle(message: DetokenizerInbox, core: Detokenizer, scheduler: Put[Stopped], mailboxes: MailboxRegistry) -> None:
    match message:
        case Sampled():
            reading = core.read(message)
            mailboxes.note(reading.written)
            for delta in reading.last:
                mailboxes.deliver(delta)
            for stop in reading.stopped:
                scheduler(stop)
        case StatusChanged():
            for change in zip(message.request_ids, message.statuses, message.num_cached_tokens, strict=True):
                mailboxes.set_status(*change)
        case Opened():
            core.open(message, mailboxes.transcripts(message.request_id))
            mailboxes.deliver(message)
        case PromptScored():
            mailboxes.deliver(message)
        case Embedded():
            core.forget(message.request_id)
            mailboxes.deliver(message)
            mailboxes.finish(message.request_id)
        case Rejected() | Ended():
            core.forget(message.request_id)
            mailboxes.deliver(message)
        case _:
            assert_never(message)
