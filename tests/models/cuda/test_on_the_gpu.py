"""The runner on a GPU: right, the same bits for every batch, and nothing left behind. `pytest -m gpu`."""

import gc
from functools import partial

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from device_world import CUDA, DeviceWorld
from guides import COLOURS, DIGITS, EOS, PERSON, tiny_guides
from runner_world import RunnerWorld, Running, tiny_config
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import in_order
from triode.models.config import ModelConfig
from triode.models.cuda.linears import GpuLinear, Proofs
from triode.models.random_model import random_config
from triode.models.sampling import SamplingParams
from triode.models.step import Output, StepResult, TokenLogprobs

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

SCORED = SamplingParams(temperature=0.8, top_p=0.95, logprobs=5)
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.2, top_k=20),
    SamplingParams(temperature=0.9, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0.5, repetition_penalty=1.2, presence_penalty=0.3),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + index * 104_729 + 11) % 499 for index in range(length)]


def of_4096(model: str) -> ModelConfig:
    """A random model with a context of so many tokens."""
    return msgspec.structs.replace(random_config(model), max_context_tokens=4096)


def half_billion() -> ModelConfig:
    return of_4096("qwen2.5-0.5b")


@pytest.mark.parametrize("params", KINDS)
def test_float32_tokens_are_those_of_the_cpu(params: SamplingParams) -> None:
    outputs = []
    with DeviceWorld(tiny_config(), torch.float32, max_running=8, max_step_tokens=128) as device:
        for world in (device, RunnerWorld()):
            rows = [world.admit(slot, prompt(20 + slot, slot), params, seed=slot) for slot in range(3)]
            world.step(*[(row, 20 + slot, Output.SAMPLE) for slot, row in enumerate(rows)])
            world.decode(*rows, num_tokens=20)
            outputs.append([row.output for row in rows])
    assert outputs[0] == outputs[1]


def remembering(world: RunnerWorld) -> list[Running]:
    """Rows of which each looks back in another way, from so few tokens that these occur again and again."""
    few = dict.fromkeys(range(20, 28), 60.0)
    kinds = [
        SamplingParams(temperature=2, logit_bias=few, repetition_penalty=1.1, presence_penalty=2, frequency_penalty=3),
        SamplingParams(temperature=2, logit_bias=few, no_repeat_ngram_size=3),
        SamplingParams(temperature=2, logit_bias={**few, 20: 90.0}, min_tokens=30, frequency_penalty=0.5),
        SamplingParams(temperature=2, logit_bias=few, no_repeat_ngram_size=2, repetition_penalty=1.02),
        SamplingParams(temperature=2, logit_bias=few),
    ]
    tokens = [20 + token % 8 for token in prompt(40)]
    words = [(21,), (22, 23), (24, 25, 22)]
    return [
        world.admit(slot, tokens[slot:], params, seed=slot, stop_token_ids=(20,), bad_word_ids=words)
        for slot, params in enumerate(kinds)
    ]


def test_tokens_that_depend_on_those_before_are_the_cpus_and_no_launch_waits_for_them() -> None:
    outputs = []
    with DeviceWorld(tiny_config(), torch.float32, max_running=8, max_step_tokens=256) as device:
        for world in (device, RunnerWorld()):
            # The first time kernels are loaded, the second time steps are captured.
            for watch in (False, False, world is device):
                rows = remembering(world)
                launch_all(world, rows, num_tokens=45, watch=watch)
                outputs.append([row.output for row in rows])
    assert all(output == outputs[-1] for output in outputs)


def launch_all(world: RunnerWorld, rows: list[Running], *, num_tokens: int, watch: bool) -> None:
    """One step ahead on a GPU. If it is watched, what waits for the device while a step is launched raises an error."""
    is_ahead = isinstance(world, DeviceWorld)
    steps = [[(row, len(row.tokens), Output.SAMPLE) for row in rows]]
    steps += [[(row, 1, Output.SAMPLE) for row in rows]] * (num_tokens - 1)
    for step in steps:
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        try:
            world.begin(*step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while len(world.begun) > is_ahead:
            world.finish()
    while world.begun:
        world.finish()


def test_guided_float32_tokens_are_those_of_the_cpu() -> None:
    outputs = []
    # With logprobs, no token is forced on the CPU either.
    guided = [SamplingParams(guide=guide, logprobs=0) for guide in (PERSON, COLOURS, DIGITS)]
    guides = tiny_guides()
    with DeviceWorld(tiny_config(), torch.float32, max_running=8, max_step_tokens=128, guides=guides) as device:
        for world in (device, RunnerWorld(guides=guides)):
            params = [*guided, KINDS[1]]
            rows = [world.admit(slot, prompt(9 + slot, slot), params[slot], seed=slot) for slot in range(4)]
            world.step(*[(row, 9 + slot, Output.SAMPLE) for slot, row in enumerate(rows)])
            world.decode(*rows, num_tokens=12)
            outputs.append([row.output for row in rows])
            assert all(row.errors == [] for row in rows)
    assert outputs[0] == outputs[1]
    assert EOS in outputs[0][1]


def test_float32_logprobs_are_close_to_those_of_the_cpu() -> None:
    entries = []
    with DeviceWorld(tiny_config(), torch.float32, max_running=8, max_step_tokens=128) as device:
        for world in (device, RunnerWorld()):
            row = world.admit(3, prompt(70), SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2))
            world.step((row, 40, Output.PROMPT_LOGPROBS))
            world.step((row, 30, Output.PROMPT_LOGPROBS_AND_SAMPLE))
            world.decode(row, num_tokens=10)
            entries.append(row.prompt_logprobs + row.logprobs)
    for got, want in zip(*entries, strict=True):
        assert (got.token_id, got.rank) == (want.token_id, want.rank)
        assert got.logprob == pytest.approx(want.logprob, abs=2e-4)


def scored(world: DeviceWorld, *, slot: int = 5, chunk: int = 4000, num_tokens: int = 24) -> Running:
    running = world.admit(slot, prompt(700), SCORED, seed=3)
    world.prefill(running, chunk)
    world.decode(running, num_tokens=num_tokens - 1)
    return running


def among_neighbours(world: DeviceWorld, num_neighbours: int, num_tokens: int = 24) -> Running:
    """In one batch with others, some of which are still reading their prompts, in another slot."""
    neighbours = [
        world.admit(slot, prompt(30 + 5 * slot, slot), KINDS[slot % len(KINDS)], seed=slot)
        for slot in range(num_neighbours)
    ]
    for first in range(0, num_neighbours, 8):
        world.step(*[(row, len(row.tokens), Output.SAMPLE) for row in neighbours[first : first + 8]])
    running = world.admit(num_neighbours, prompt(700), SCORED, seed=3)
    world.step(*[(row, 1, Output.SAMPLE) for row in neighbours], (running, 300, Output.NONE))
    world.step((running, 400, Output.SAMPLE), *[(row, 1, Output.SAMPLE) for row in neighbours])
    for _ in range(num_tokens - 1):
        world.step(*[(row, 1, Output.SAMPLE) for row in neighbours], (running, 1, Output.SAMPLE))
    return running


def shared_prefix(world: DeviceWorld, num_tokens: int = 24) -> Running:
    """The first 688 tokens are in blocks that another sequence has computed."""
    first = world.admit(1, prompt(700), SCORED, seed=9)
    world.prefill(first, 256)
    running = world.admit(2, prompt(700), SCORED, seed=3)
    running.blocks = first.blocks[:43]
    running.num_computed = 43 * 16
    world.give_blocks(running, 700)
    world.changes[-1] = msgspec.structs.replace(world.changes[-1], first_block=0, block_ids=tuple(running.blocks))
    world.prefill(running)
    world.decode(running, num_tokens=num_tokens - 1)
    return running


def readmitted(world: DeviceWorld, whole: Running) -> Running:
    """Preempted after ten tokens and computed again."""
    running = world.admit(7, whole.tokens[:710], SCORED, num_prompt_tokens=700, seed=3)
    world.prefill(running, 300)
    world.decode(running, num_tokens=13)
    return running


def test_logprobs_do_not_depend_on_batch_chunks_prefix_or_preemption() -> None:
    with DeviceWorld(half_billion(), torch.bfloat16) as world:
        whole = scored(world)
        assert len(whole.logprobs) == 24
        differing = {}
        ways = {
            "again": partial(scored, world),
            "chunks of 64": partial(scored, world, chunk=64),
            "chunks of 37": partial(scored, world, chunk=37),
            "chunks of 512": partial(scored, world, chunk=512),
            "another slot": partial(scored, world, slot=0),
            "7 neighbours": partial(among_neighbours, world, 7),
            "63 neighbours": partial(among_neighbours, world, 63),
            "prefix": partial(shared_prefix, world),
        }
        for name, way in ways.items():
            logprobs = way().logprobs
            if logprobs != whole.logprobs:
                differing[name] = sum(got != want for got, want in zip(logprobs, whole.logprobs, strict=True))
        if readmitted(world, whole).logprobs != whole.logprobs[10:]:
            differing["preempted"] = 10
        assert differing == {}


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "tiny-qwen2", "tiny-qwen3"])
def test_rows_that_go_through_the_last_layer_alone_have_the_bits_of_rows_among_all_tokens(model: str) -> None:
    """A prompt that is scored in the same step keeps all tokens. What is decoded shows the keys and values.

    With a bias of queries, keys and values, with a window in the last layer, too, and with a norm of queries and keys.
    """
    lengths = (3, 130, 700, 1)
    entries: list[list[tuple[TokenLogprobs, ...]]] = []
    with DeviceWorld(of_4096(model), torch.bfloat16, max_running=8) as world:
        # The last way makes a step of fixed shape of the first one, which is captured when it comes again.
        for extra, is_scored in ((2000, True), (2000, False), (50, True), (50, False), (50, False), (50, False)):
            rows = [world.admit(slot, prompt(length, slot), SCORED, seed=slot) for slot, length in enumerate(lengths)]
            asked = msgspec.structs.replace(SCORED, prompt_logprobs=0 if is_scored else None)
            rows.append(world.admit(4, prompt(extra), asked, seed=9))
            output = Output.PROMPT_LOGPROBS_AND_SAMPLE if is_scored else Output.SAMPLE
            world.step(*[(row, len(row.tokens), Output.SAMPLE) for row in rows[:-1]], (rows[-1], extra, output))
            world.decode(*rows, num_tokens=4)
            entries.append([tuple(row.logprobs) for row in rows])
            for row in rows:
                world.free += row.blocks
    assert entries[0] == entries[1]
    assert all(entry == entries[2] for entry in entries[3:])
    assert entries[0][:-1] == entries[2][:-1]


@pytest.mark.parametrize("model", ["qwen2.5-7b", "llama-3.1-8b", "qwen2.5-0.5b", "smollm2-135m"])
def test_keys_and_values_by_themselves_have_the_bits_of_those_beside_queries(model: str) -> None:
    """A prompt's are computed by themselves in the last layer, those of a token that goes on with its queries."""
    config, traits = random_config(model), GpuTraits.of(CUDA)
    counts = (1, 16, 65, 256, 1024, 4096)
    weight = torch.randn(config.q_size + 2 * config.kv_size, config.hidden_size, device=CUDA).bfloat16() * 0.03
    x = torch.randn(counts[-1], config.hidden_size, device=CUDA).bfloat16()
    proofs = Proofs(traits)
    outs: list[list[torch.Tensor]] = []
    with in_order(CUDA):
        for part in (weight, weight[config.q_size :]):
            proof = proofs.of(part, None, part.dtype, counts[-1])
            product = GpuLinear(part, None, proof.triton_tokens, traits)
            outs.append([torch.full((count, len(part)), torch.nan, device=CUDA).bfloat16() for count in counts])
            for count, out in zip(counts, outs[-1], strict=True):
                product(x[:count], out)
    differing = [
        count
        for count, qkv, kv in zip(counts, *outs, strict=True)
        if not (torch.equal(kv, qkv[:, config.q_size :]) and torch.equal(kv, outs[1][-1][:count]))
    ]
    assert differing == []


def test_steps_launched_ahead_give_the_tokens_of_steps_read_at_once() -> None:
    with DeviceWorld(half_billion(), torch.bfloat16, max_running=8) as world:
        at_once = scored(world).output
        running = world.admit(6, prompt(700), SCORED, seed=3)
        world.runner.launch(world.plan((running, 700, Output.SAMPLE)))
        results: list[StepResult] = []
        for computed in range(700, 723):
            running.num_computed = computed
            world.runner.launch(world.plan((running, 1, Output.SAMPLE)))
            results.append(world.runner.collect())
        results.append(world.runner.collect())
        assert [result.token_ids[0] for result in results] == at_once


def test_a_closed_runner_leaves_no_memory_behind() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    frees = []
    for _ in range(3):
        with DeviceWorld(half_billion(), torch.bfloat16, max_running=8) as world:
            scored(world, num_tokens=4)
        del world
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated(CUDA) == before
        frees.append(torch.cuda.mem_get_info()[0])
    assert abs(frees[2] - frees[1]) < 64 << 20
