"""Thousands of cancellations in a full batch: blocks return as they must, and no neighbour's bits change."""

import random
from collections.abc import Sequence

import pytest
import trio

import triode
from engines import LONG, check_nothing_is_left, complete, drawn
from gpu_proofs import Record, Scale, bits, new_salt, scales, scored
from triode.actors.messages import Cancel, StepResult
from triode.engine.engine import Engine
from triode.ids import SequenceId


class BlocksReturn:
    """Watches a scheduler: what is cancelled gives its blocks back when the last step that was launched retires."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.num_watched = 0
        self.most_steps = 0
        self._core = engine._hub._scheduler
        self._abort, self._commit = self._core.abort, self._core.commit
        self._waiting: list[tuple[int, set[SequenceId]]] = []
        patch.setattr(self._core, "abort", self.abort)
        patch.setattr(self._core, "commit", self.commit)

    def abort(self, cancel: Cancel) -> None:
        request = self._core._registry.find_arrival(cancel.request_id, cancel.arrival)
        self._abort(cancel)
        if request is not None:
            now = self._core.statistics()
            self.num_watched += 1
            self.most_steps = max(self.most_steps, now.num_steps_in_flight)
            self._waiting.append((now.num_steps, {sequence.sequence_id for sequence in request.sequences}))
            self._check()

    def commit(self, result: StepResult) -> None:
        self._commit(result)
        self._check()

    def _check(self) -> None:
        now = self._core.statistics()
        num_retired = now.num_steps - now.num_steps_in_flight
        for num_launched, sequences in self._waiting:
            if num_launched <= num_retired:
                assert sequences.isdisjoint(self._core._registry.sequences), "cancelled sequences keep their blocks"
        self._waiting = [entry for entry in self._waiting if entry[0] > num_retired]


class Storm:
    """Requests that are given up at any moment, and others that must not notice."""

    def __init__(self, engine: Engine, scale: Scale) -> None:
        self.num_equal = self.num_compared = 0
        self._engine = engine
        self._scale = scale
        self._random = random.Random(1)
        self._lives = iter(range(scale.num_lives))
        self._num_alive = 0

    async def run(self, prompts: Sequence[list[int]], expected: Sequence[object]) -> None:
        num_callers = self._scale.max_running - len(prompts)
        self._num_alive = num_callers
        async with trio.open_nursery() as nursery:
            for prompt, its_bits in zip(prompts, expected, strict=True):
                nursery.start_soon(self._watch, prompt, its_bits)
            for _ in range(num_callers):
                nursery.start_soon(self._call)

    async def _watch(self, prompt: list[int], expected: object) -> None:
        while self._num_alive:
            result = await complete(
                self._engine, prompt, scored(self._scale.new_tokens), cache_salt=new_salt(), priority=-1
            )
            self.num_compared += 1
            self.num_equal += bits(result) == expected

    async def _call(self) -> None:
        for _ in self._lives:
            await self._live()
        self._num_alive -= 1

    async def _live(self) -> None:
        prompt = [self._random.randrange(40_000) for _ in range(self._random.randrange(1, 200))]
        params = drawn(LONG // 10, n=self._random.choice((1, 1, 1, 2)))
        way = self._random.randrange(3)
        with trio.move_on_after(self._random.random() * 0.2 if way == 0 else float("inf")):
            async with self._engine.submit(prompt, params) as stream:
                await self._read_some(stream)
                if way == 1:
                    self._engine.cancel(stream.request_id)
                    await stream.result()

    async def _read_some(self, stream: triode.RequestStream) -> None:
        for _ in range(self._random.randrange(12)):
            if not await stream.batch():
                return


@scales
async def test_cancellations_in_a_full_batch_return_every_block_and_change_no_neighbour(
    scale: Scale, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    async with scale.open() as engine:
        prompts = [[(97 * index + step) % 40_000 for step in range(20 + index)] for index in range(scale.num_watched)]
        expected = [
            bits(await complete(engine, prompt, scored(scale.new_tokens), cache_salt=new_salt())) for prompt in prompts
        ]
        blocks = BlocksReturn(engine, monkeypatch)
        storm = Storm(engine, scale)
        before = engine.statistics().runner
        await storm.run(prompts, expected)
        after = engine.statistics().runner
        await check_nothing_is_left(engine)
    record_property("cancelled while known to the scheduler", blocks.num_watched)
    record_property(
        "mean rows a step", round((after.num_rows - before.num_rows) / (after.num_steps - before.num_steps))
    )
    record_property("steps until blocks return, at most", blocks.most_steps)
    record_property("neighbours' outputs equal", f"{storm.num_equal} of {storm.num_compared}")
    assert blocks.num_watched > 0.8 * scale.num_lives
    assert blocks.most_steps <= 2
    assert storm.num_equal == storm.num_compared > 0
