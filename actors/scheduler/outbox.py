"""What the scheduler has to say, collected while it decides; the shell takes it and sends it."""

from triode.actors.messages import DetokenizerInbox, Launched, Release, StatusChanged, Tokenized
from triode.actors.scheduler.request import Request
from triode.cache.messages import ReleaseRow
from triode.ids import RequestId, SequenceId
from triode.models.guide import Guide


class Outbox:
    """Messages in the order in which they must be sent; launches and releases are gathered into one each."""

    def __init__(self) -> None:
        self._detokenizer: list[DetokenizerInbox] = []
        self._launched: list[tuple[SequenceId, int]] = []
        self._released: list[ReleaseRow] = []
        self._guides: list[Guide] = []
        self._changed: dict[RequestId, Request] = {}

    def to_detokenizer(self, message: DetokenizerInbox) -> None:
        """Queue a message for the detokenizer."""
        self._detokenizer.append(message)

    @property
    def holds_news(self) -> bool:
        """Whether there is something to say to the detokenizer."""
        return bool(self._detokenizer or self._changed)

    def launched(self, sequence_id: SequenceId, num_tokens: int) -> None:
        """Note how much of a prompt has KV entries after a step that is sent now."""
        self._launched.append((sequence_id, num_tokens))

    def release(self, row: ReleaseRow) -> None:
        """Queue a sequence's blocks for return."""
        self._released.append(row)

    def release_guide(self, tokenized: Tokenized) -> None:
        """Queue the guide of a request that has ended, if it has one."""
        if tokenized.params.guide is not None:
            self._guides.append(tokenized.params.guide)

    def status_of(self, request: Request) -> None:
        """Note that the request's status may have changed."""
        self._changed[request.request_id] = request

    def take_launched(self) -> Launched | None:
        """One message for the prompts of all steps sent since the last call."""
        if not self._launched:
            return None
        sequence_ids, nums_tokens = zip(*self._launched, strict=True)
        self._launched = []
        return Launched(sequence_ids, nums_tokens)

    def take_releases(self, now_s: float) -> Release | None:
        """One message for all sequences that have gone since the last call."""
        if not self._released:
            return None
        rows, self._released = tuple(self._released), []
        return Release(rows, now_s)

    def take_guides(self) -> list[Guide]:
        """Those of the requests that have ended since the last call."""
        guides, self._guides = self._guides, []
        return guides

    def take_for_detokenizer(self) -> list[DetokenizerInbox]:
        """Everything said since the last call."""
        messages, self._detokenizer = self._detokenizer, []
        changes = self._take_changes()
        return messages if changes is None else [*messages, changes]

    def _take_changes(self) -> StatusChanged | None:
        changed = []
        for request in self._changed.values():
            status = request.status
            if not status.is_final and status is not request.reported:
                request.reported = status
                changed.append((request.request_id, status, request.num_cached_tokens))
        self._changed.clear()
        if not changed:
            return None
        ids, statuses, num_cached = zip(*changed, strict=True)
        return StatusChanged(ids, statuses, num_cached)
