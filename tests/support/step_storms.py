"""Steps of every kind that requests may ask of a runner, by their sizes alone: hits of any length, prompts together, chunks
beside decoding rows, batches, and rows whose hidden states are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from runner_world import BLOCK_SIZE_TOKENS, RunnerWorld
from triode.ids import BlockId
from triode.models.sampling import SamplingParams
from triode.models.step import Output, Pooling, StepPlan

NUM_KINDS = 6
SCORED = Output.PROMPT_LOGPROBS_AND_SAMPLE


@dataclass(frozen=True)
class StormRow:
    """A row of a step."""

    num_before: int
    """Tokens that have been computed."""
    num_tokens: int
    output: Output = Output.SAMPLE


@dataclass(frozen=True)
class Storm:
    """What a runner serves."""

    max_rows: int
    max_step_tokens: int
    max_context_tokens: int

    def steps(self, random: Random, num_steps: int) -> Iterator[Sequence[StormRow]]:
        """Steps of all kinds in turns."""
        for number in range(num_steps):
            yield self._step(random, number % NUM_KINDS)

    def blocks(self) -> list[BlockId]:
        """As many as one sequence needs: all may share them, where nobody asks what comes of it."""
        return list(map(BlockId, range(1, -(-self.max_context_tokens // BLOCK_SIZE_TOKENS) + 1)))

    def plan(self, world: RunnerWorld, rows: Sequence[StormRow], params: Sequence[SamplingParams]) -> StepPlan:
        """A step of new sequences, whose params are taken in turns."""
        steps = []
        for slot, row in enumerate(rows):
            mine = params[slot % len(params)]
            if row.output is SCORED:
                mine = msgspec.structs.replace(mine, prompt_logprobs=0)
            end = row.num_before + row.num_tokens
            tokens = [1] * (end + (row.output is Output.NONE))
            running = world.admit(slot, tokens, mine, seed=slot, stop_token_ids=(3,), pooling=Pooling.MEAN)
            running.num_computed = row.num_before
            world.free = self.blocks()
            world.give_blocks(running, end)
            steps.append((running, row.num_tokens, row.output))
        return world.plan(*steps)

    def _step(self, random: Random, kind: int) -> Sequence[StormRow]:
        num_rows = _few(random, self.max_rows)
        match kind:
            case 0:
                return [self._prompt(random, self.max_step_tokens)]
            case 1:
                most_tokens = self.max_step_tokens // num_rows
                return [self._prompt(random, most_tokens) for _ in range(num_rows)]
            case 2:
                return self._beside(random, num_rows - 1, _few(random, self.max_step_tokens - num_rows + 1))
            case 3:
                # A chunk ends before its prompt does where a step holds no more.
                *others, chunk = self._beside(random, num_rows - 1, self.max_step_tokens - num_rows + 1)
                return [*others, StormRow(chunk.num_before, chunk.num_tokens, Output.NONE)]
            case 4:
                return [StormRow(_few(random, self.max_context_tokens - 1) - 1, 1) for _ in range(num_rows)]
            case _:
                rows = self._step(random, random.choice((0, 1)))
                output = random.choice((SCORED, Output.HIDDEN))
                return [StormRow(0, row.num_tokens, output) for row in rows]

    def _prompt(self, random: Random, most_tokens: int) -> StormRow:
        return self._behind(random, _few(random, max(1, most_tokens)))

    def _behind(self, random: Random, num_tokens: int) -> StormRow:
        num_tokens = min(num_tokens, self.max_context_tokens - 1)
        room = self.max_context_tokens - 1 - num_tokens
        return StormRow(random.choice((0, random.randint(0, room), room)), num_tokens)

    def _beside(self, random: Random, num_rows: int, num_tokens: int) -> list[StormRow]:
        rows = [StormRow(random.randint(0, self.max_context_tokens - 2), 1) for _ in range(num_rows)]
        return [*rows, self._behind(random, num_tokens)]


def _few(random: Random, most: int) -> int:
    """Of all orders of magnitude up to this one, as often the most itself."""
    return min(most, int(2 ** random.uniform(0, (most + 1).bit_length())))
