"""Drives a runner over a tiny random model as the scheduler would: slots, epochs, block tables."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random

import msgspec
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool
from triode.ids import BlockId, SlotId, StepId, TokenId, pack_tokens
from triode.kernels.dispatch import choose_kernels
from triode.models.ahead import AheadRunner
from triode.models.config import ModelConfig
from triode.models.decoder import Decoder
from triode.models.eager import EagerRunner, RunnerSettings
from triode.models.grammar import GuideCompiler
from triode.models.native import NativeDecoder
from triode.models.progress import NullProgress
from triode.models.random_model import RandomTensors, random_config
from triode.models.runner import Runner
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, Pooling, StepPlan, StepResult, TableChange, TokenLogprobs
from triode.models.tensors import load_weights
from triode.models.weights import DecoderWeights

BLOCK_SIZE_TOKENS = 16
CPU = torch.device("cpu")


@cache
def tiny_config() -> ModelConfig:
    return msgspec.structs.replace(random_config("tiny"), vocab_size=499, max_context_tokens=256)


@cache
def weights_of(config: ModelConfig) -> DecoderWeights:
    return load_weights(config, RandomTensors(config, 0), torch.float32, CPU, NullProgress())


def tiny_weights() -> DecoderWeights:
    return weights_of(tiny_config())


@cache
def decoder_of(config: ModelConfig) -> Decoder:
    with torch.inference_mode():
        return Decoder(config, weights_of(config), choose_kernels(CPU, torch.float32))


def tiny_decoder() -> Decoder:
    return decoder_of(tiny_config())


@dataclass
class Running:
    """A sequence in a slot, and what has come of it."""

    slot: SlotId
    epoch: int
    tokens: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    errors: list[str] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


class RunnerWorld:
    """A runner and the blocks it may use, handed out in random order."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        max_running: int = 8,
        seed: int = 0,
        guides: GuideCompiler | None = None,
        native: NativeDecoder | None = None,
        ahead: bool = False,
    ) -> None:
        """`native` computes instead of torch, and launches `ahead` if told. `config` is the tiny one unless told."""
        config = config or tiny_config()
        decoder = native or decoder_of(config)
        self.pool = KVPool(
            128,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=decoder.dtype,
            device=CPU,
        )
        # What nobody has written must never be read.
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.fill_(torch.nan)
        settings: RunnerSettings = {"max_running": max_running, "guides": guides}
        self.runner: Runner = EagerRunner(decoder, self.pool, **settings)
        if ahead:
            assert native is not None, "only the compiled step launches ahead"
            self.runner = AheadRunner(native, self.pool, **settings)
        self._start(128, seed)

    def _start(self, num_blocks: int, seed: int) -> None:
        """Nothing is running, and the blocks are free in random order."""
        self.free = list(map(BlockId, range(1, num_blocks)))
        Random(seed).shuffle(self.free)
        self.num_steps = 0
        self.num_epochs = 0
        self.admissions: list[Admission] = []
        self.changes: list[TableChange] = []
        self.copies: list[BlockCopy] = []
        self.begun: deque[tuple[tuple[Running, int, Output], ...]] = deque()

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        num_prompt_tokens: int | None = None,
        seed: int = 0,
        sample_index: int = 0,
        stop_token_ids: Sequence[int] = (),
        bad_word_ids: Sequence[Sequence[int]] = (),
        pooling: Pooling | None = None,
    ) -> Running:
        self.num_epochs += 1
        num_prompt_tokens = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        running = Running(SlotId(slot), self.num_epochs, list(tokens), num_prompt_tokens)
        self.admissions.append(
            Admission(
                slot=running.slot,
                epoch=running.epoch,
                packed_ids=pack_tokens(tokens),
                num_prompt_tokens=num_prompt_tokens,
                params=params or SamplingParams(temperature=0),
                seed=seed,
                sample_index=sample_index,
                stop_token_ids=tuple(map(TokenId, stop_token_ids)),
                bad_word_ids=tuple(tuple(map(TokenId, word)) for word in bad_word_ids),
                pooling=pooling,
            )
        )
        return running

    def give_blocks(self, running: Running, num_tokens: int) -> None:
        """Blocks for so many tokens in all."""
        missing = -(-num_tokens // BLOCK_SIZE_TOKENS) - len(running.blocks)
        if missing > 0:
            new = [self.free.pop() for _ in range(missing)]
            self.changes.append(TableChange(running.slot, len(running.blocks), tuple(new)))
            running.blocks += new

    def plan(self, *rows: tuple[Running, int, Output]) -> StepPlan:
        """A step of these rows: (sequence, query tokens, output)."""
        for running, num_tokens, _ in rows:
            self.give_blocks(running, running.num_computed + num_tokens)
        plan = StepPlan(
            step_id=StepId(self.num_steps),
            slots=tuple(running.slot for running, _, _ in rows),
            epochs=tuple(running.epoch for running, _, _ in rows),
            start_positions=tuple(running.num_computed for running, _, _ in rows),
            num_query_tokens=tuple(num_tokens for _, num_tokens, _ in rows),
            outputs=tuple(output for _, _, output in rows),
            admissions=tuple(self.admissions),
            table_changes=tuple(self.changes),
            copies=tuple(self.copies),
        )
        self.num_steps += 1
        self.admissions, self.changes, self.copies = [], [], []
        return plan

    def step(self, *rows: tuple[Running, int, Output]) -> StepResult:
        """Run a step and let the sequences know."""
        self.begin(*rows)
        return self.finish()

    def begin(self, *rows: tuple[Running, int, Output]) -> None:
        """Launch a step."""
        self.runner.launch(self.plan(*rows))
        for running, num_tokens, _ in rows:
            running.num_computed += num_tokens
        self.begun.append(rows)

    def finish(self) -> StepResult:
        """Let the sequences know of the oldest step."""
        rows, result = self.begun.popleft(), self.runner.collect()
        token_ids = iter(result.token_ids)
        logprobs = iter(result.logprobs or ())
        for row, (running, _, _) in enumerate(rows):
            for _ in range(result.num_accepted[row]):
                running.tokens.append(next(token_ids))
                if (entry := next(logprobs, None)) is not None:
                    running.logprobs.append(entry)
            if result.errors is not None and (error := result.errors[row]) is not None:
                running.errors.append(error.reason)
            if result.prompt_logprobs is not None:
                running.prompt_logprobs += result.prompt_logprobs[row]
            if result.embeddings is not None and result.embeddings[row]:
                running.embedding = result.embeddings[row]
        return result

    def prefill(self, running: Running, chunk: int = 1000) -> None:
        """All known tokens in chunks; the last one samples."""
        while running.num_computed < (known := len(running.tokens)):
            num_tokens = min(chunk, known - running.num_computed)
            ends = running.num_computed + num_tokens == known
            self.step((running, num_tokens, Output.SAMPLE if ends else Output.NONE))
            if ends:
                return

    def decode(self, *sequences: Running, num_tokens: int) -> None:
        """So many more tokens of each."""
        for _ in range(num_tokens):
            self.step(*[(running, 1, Output.SAMPLE) for running in sequences])
