"""Whole steps: each row goes to its reader, and the scheduler hears where texts with stop strings end."""

from collections.abc import Sequence

from trained_tokenizers import byte_level_bpe, id_of
from triode.actors.detokenizer.batch import Detokenizer, Reading
from triode.actors.detokenizer.incremental import DecoderFactory
from triode.actors.messages import Delta, FinishReason, Opened, Sampled, Stopped
from triode.actors.transcript import Transcript
from triode.ids import RequestId, StepId, TokenId
from triode.models.sampling import SamplingParams
from triode.models.step import TokenLogprobs

BACKEND = byte_level_bpe()
FACTORY = DecoderFactory(BACKEND)
EOS = TokenId(id_of(BACKEND, "<|im_end|>"))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def ids(text: str) -> list[TokenId]:
    return [TokenId(token) for token in BACKEND.encode(text).ids]


class Reader:
    """A detokenizer, and its transcripts as deltas."""

    def __init__(self, params: dict[str, SamplingParams]) -> None:
        self._core = Detokenizer(FACTORY)
        self._samples: dict[tuple[str, int], Transcript] = {}
        for name, own in params.items():
            transcripts = [Transcript() for _ in range(own.n)]
            self._core.open(Opened(RequestId(name), 1, 0, own, (TokenId(1),)), transcripts)
            self._samples |= {(name, index): transcript for index, transcript in enumerate(transcripts)}

    def __len__(self) -> int:
        return len(self._core)

    def forget(self, request_id: RequestId) -> None:
        self._core.forget(request_id)

    def read(self, message: Sampled) -> tuple[list[Delta], list[Stopped]]:
        """What has been written for each row, or is to be written at an end, in the rows' order."""
        before = {place: len(transcript.token_ids) for place, transcript in self._samples.items()}
        reading = self._core.read(message)
        deltas = []
        for place in dict.fromkeys(zip(message.request_ids, message.sample_indices, strict=True)):
            if place not in self._samples:
                continue
            transcript, begin = self._samples[place], before[place]
            logprobs = tuple(transcript.logprobs[begin:])
            for index in range(begin, len(transcript.token_ids)):
                own = (logprobs[index - begin],) if logprobs else None
                deltas.append(Delta(*place, transcript.texts[index], (transcript.token_ids[index],), own))
            deltas += [delta for delta in reading.last if (delta.request_id, delta.index) == place]
        assert reading.written == [delta.request_id for delta in deltas if delta.finish_reason is None]
        return deltas, reading.stopped


def detokenizer(**params: SamplingParams) -> Reader:
    return Reader(params)


Row = tuple[str, int, TokenId, FinishReason | None]


def sampled(*rows: Row, logprobs: Sequence[TokenLogprobs | None] | None = None) -> Sampled:
    names, indices, tokens, reasons = zip(*rows, strict=True)
    scores = None if logprobs is None else tuple(logprobs)
    return Sampled(StepId(0), tuple(map(RequestId, names)), indices, tokens, reasons, scores)


def read_all(
    core: Reader, name: str, tokens: Sequence[TokenId], last: FinishReason
) -> tuple[list[Delta], list[Stopped]]:
    """One token a step, the last with its reason."""
    deltas, stopped = [], []
    for place, token in enumerate(tokens):
        reason = last if place == len(tokens) - 1 else None
        new_deltas, new_stopped = core.read(sampled((name, 0, token, reason)))
        deltas += new_deltas
        stopped += new_stopped
    return deltas, stopped


def test_each_row_goes_to_its_own_request_and_sample() -> None:
    core = detokenizer(a=SamplingParams(), b=SamplingParams(n=2))
    (x,), (y,), (z,) = ids("x"), ids("y"), ids("z")
    deltas, stopped = core.read(sampled(("b", 1, x, None), ("a", 0, y, None), ("b", 0, z, LENGTH)))
    seen = [(delta.request_id, delta.index, delta.text, delta.token_ids, delta.finish_reason) for delta in deltas]
    assert seen == [("b", 1, "x", (x,), None), ("a", 0, "y", (y,), None), ("b", 0, "z", (z,), LENGTH)]
    assert stopped == []


def test_logprobs_travel_with_their_tokens() -> None:
    core = detokenizer(a=SamplingParams(logprobs=0), b=SamplingParams())
    (x,) = ids("x")
    entry = TokenLogprobs(x, -0.5, 1)
    deltas, _ = core.read(sampled(("a", 0, x, None), ("b", 0, x, None), logprobs=(entry, None)))
    assert [delta.logprobs for delta in deltas] == [(entry,), None]


def test_a_request_is_forgotten_with_its_last_sample() -> None:
    core = detokenizer(a=SamplingParams(n=2))
    (x,) = ids("x")
    core.read(sampled(("a", 0, x, LENGTH)))
    assert len(core) == 1
    core.read(sampled(("a", 1, x, LENGTH)))
    assert len(core) == 0


def test_tokens_of_who_has_ended_are_ignored() -> None:
    core = detokenizer(a=SamplingParams(n=2), b=SamplingParams())
    (x,) = ids("x")
    core.read(sampled(("a", 0, x, LENGTH)))
    core.forget(RequestId("b"))
    core.forget(RequestId("nobody"))
    deltas, stopped = core.read(sampled(("a", 0, x, None), ("b", 0, x, None), ("nobody", 0, x, LENGTH)))
    assert (deltas, stopped) == ([], [])


def test_the_stop_token_is_named_and_not_shown() -> None:
    core = detokenizer(a=SamplingParams(skip_special_tokens=False), b=SamplingParams(include_stop=True, n=1))
    text = ids("hello")
    deltas, stopped = read_all(core, "a", [*text, EOS], STOP)
    assert "".join(delta.text for delta in deltas) == "hello"
    assert (deltas[-1].token_ids, deltas[-1].finish_reason, deltas[-1].stop_reason) == ((EOS,), STOP, EOS)
    assert stopped == []


def test_a_stop_string_ends_the_text_and_the_scheduler_hears_where() -> None:
    core = detokenizer(a=SamplingParams(stop=("lo wo",)))
    tokens = ids("hello world")
    deltas, stopped = [], []
    for token in tokens:
        new_deltas, new_stopped = core.read(sampled(("a", 0, token, None)))
        deltas += new_deltas
        stopped += new_stopped
    assert "".join(delta.text for delta in deltas) == "hel"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (STOP, "lo wo")
    assert stopped == [Stopped(RequestId("a"), 0, len(deltas))]
    assert len(core) == 0


def test_a_text_that_ends_without_its_stop_string_is_settled_too() -> None:
    core = detokenizer(a=SamplingParams(stop=("never",)))
    tokens = ids("hello ne")
    deltas, stopped = read_all(core, "a", tokens, LENGTH)
    assert "".join(delta.text for delta in deltas) == "hello ne"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (LENGTH, None)
    assert stopped == [Stopped(RequestId("a"), 0, len(tokens))]


def test_a_stop_string_completed_by_the_last_token_beats_the_length() -> None:
    core = detokenizer(a=SamplingParams(stop=("lo",)))
    deltas, _ = read_all(core, "a", ids("hello"), LENGTH)
    assert "".join(delta.text for delta in deltas) == "hel"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (STOP, "lo")


def test_half_a_character_is_held_until_it_is_whole_or_the_text_ends() -> None:
    core = detokenizer(a=SamplingParams(), b=SamplingParams())
    tokens = ids("👍")
    assert len(tokens) > 1
    deltas, _ = read_all(core, "a", tokens, LENGTH)
    assert [delta.text for delta in deltas] == [""] * (len(tokens) - 1) + ["👍"]
    cut, _ = read_all(core, "b", tokens[:-1], LENGTH)
    assert set("".join(delta.text for delta in cut)) == {"�"}


def test_a_request_that_has_nowhere_to_write_has_ended() -> None:
    core = Detokenizer(FACTORY)
    core.open(Opened(RequestId("a"), 1, 0, SamplingParams(), (TokenId(1),)), ())
    assert len(core) == 0
    (x,) = ids("x")
    assert core.read(sampled(("a", 0, x, LENGTH))) == Reading([], [], [])
