"""Registry: every request and sequence that the scheduler still has to do with, by id."""

from triode.actors.messages import Tokenized
from triode.actors.scheduler.admission import namespace_of
from triode.actors.scheduler.request import Request, Sequence
from triode.ids import RequestId, SequenceId


class Registry:
    """Files requests from their tokenized prompt to the retirement of their last step."""

    def __init__(self) -> None:
        self.sequences: dict[SequenceId, Sequence] = {}
        """To read. A sequence that has ended stays until no launched step includes it."""
        self._requests: dict[RequestId, Request] = {}
        self._next_sequence = 0

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request_id: RequestId) -> Request | None:
        """The latest request of this id."""
        return self._requests.get(request_id)

    def find_arrival(self, request_id: RequestId, arrival: int) -> Request | None:
        """The request of this id if it came with this submit: an id may be used again."""
        request = self._requests.get(request_id)
        return request if request is not None and request.arrival == arrival else None

    def file(self, tokenized: Tokenized, priority: int) -> Request:
        """A new request, with a sequence for each sample."""
        request = Request(
            request_id=tokenized.request_id,
            arrival=tokenized.arrival,
            priority=priority,
            tokenized=tokenized,
            stop_token_ids=frozenset(tokenized.stop_token_ids),
            namespace=namespace_of(tokenized.cache_salt),
        )
        for index in range(tokenized.params.n):
            sequence = Sequence(SequenceId(self._next_sequence), request, index, list(tokenized.token_ids))
            self._next_sequence += 1
            self.sequences[sequence.sequence_id] = sequence
            request.sequences.append(sequence)
        self._requests[request.request_id] = request
        return request

    def forget(self, sequence: Sequence) -> bool:
        """Drop a sequence. Returns whether it was its request's last one, which is dropped with it."""
        del self.sequences[sequence.sequence_id]
        request = sequence.request
        if any(other.sequence_id in self.sequences for other in request.sequences):
            return False
        # Its id may belong to a new request already: the old one had ended, only its last steps had not.
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
        return True
