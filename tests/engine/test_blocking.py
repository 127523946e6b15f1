"""LLM: the engine for scripts and notebooks, without an event loop."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import triode
from crashes import CORES, Bomb, Boom, pausable_steps
from engines import LONG, SMALL, TINY, drawn, greedy, threads_of_ours
from triode.errors import EngineClosed, EngineFault

PROMPT = "The quick brown fox jumps over the lazy dog, and then it rests."


def open_tiny(**overrides: Any) -> triode.LLM:
    return triode.LLM(TINY, **{**SMALL, **overrides})


@pytest.fixture
def llm() -> Iterator[triode.LLM]:
    with open_tiny() as llm:
        yield llm


def wait_until_nothing_is_left(llm: triode.LLM) -> None:
    pause = threading.Event()
    while llm.statistics().scheduler.num_requests or llm.statistics().num_unfinished:
        pause.wait(0.002)
    assert llm.statistics().cache.num_used_blocks == 0


def test_generate_and_stream_agree(llm: triode.LLM) -> None:
    results = llm.generate([PROMPT, [1, 2, 3], [{"role": "user", "content": "Hi."}]], greedy(9))
    deltas = list(llm.stream(PROMPT, greedy(9)))
    assert "".join(delta.text for delta in deltas) == results[0].completion.text
    assert [len(result.completion.token_ids) for result in results] == [9, 9, 9]
    assert llm.report.model == TINY
    assert len(llm.embed([PROMPT])[0]) == 64
    assert llm.embed([PROMPT], pooling="last") != llm.embed([PROMPT])
    assert llm.embed([llm.encode(PROMPT)]) == llm.embed([PROMPT])


def test_refusals_rise(llm: triode.LLM) -> None:
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        llm.stream("")
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        llm.generate([""])
    with pytest.raises(ValueError, match="prompts must be a list of prompts, got one text: 'The quick"):
        llm.generate(PROMPT)
    with pytest.raises(ValueError, match="params must be one, or one for each of the 2 prompts, got 1"):
        llm.generate([PROMPT, PROMPT], [greedy(1)])


def test_leaving_the_loop_frees_the_request(llm: triode.LLM) -> None:
    for delta in llm.stream(PROMPT, greedy(LONG)):
        assert delta.token_ids
        break
    wait_until_nothing_is_left(llm)


def test_a_stream_that_is_never_read_is_cancelled_with_a_warning(llm: triode.LLM) -> None:
    stream = llm.stream(PROMPT, greedy(LONG))
    with pytest.warns(ResourceWarning, match="was dropped unfinished"):
        del stream
    wait_until_nothing_is_left(llm)


def test_threads_share_an_engine(llm: triode.LLM) -> None:
    alone = [llm.generate([[index + 1, 7]], drawn(6))[0].completion.text for index in range(4)]
    together = [""] * 4

    def read(index: int) -> None:
        together[index] = "".join(delta.text for delta in llm.stream([index + 1, 7], drawn(6)))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_closing_ends_the_streams() -> None:
    llm = open_tiny()
    stream = llm.stream(PROMPT, greedy(LONG))
    next(stream)
    llm.close()
    llm.close()
    assert sum(len(delta.token_ids) for delta in stream) < LONG
    with pytest.raises(EngineClosed, match="the engine has been closed; open another"):
        llm.generate([PROMPT])
    with pytest.raises(EngineClosed, match="has been closed"):
        llm.stream(PROMPT)
    assert llm.statistics().num_submitted == 1
    assert threads_of_ours() == []


def test_closing_ends_a_generate_in_another_thread() -> None:
    llm = open_tiny()
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            llm.generate([PROMPT] * 3, greedy(LONG))
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while not llm.statistics().scheduler.num_running:
        pass
    llm.close()
    thread.join(5)
    assert len(errors) == 1


def test_an_engine_that_cannot_open_says_why() -> None:
    with pytest.raises(triode.ModelNotFound, match="there is no random model 'nothing'"):
        triode.LLM("random:nothing")
    with pytest.raises(ValueError, match=r"config keys must be among .*, got max_runing"):
        triode.LLM(TINY, max_runing=3)
    assert threads_of_ours() == []


@pytest.mark.parametrize("actor", CORES)
def test_whoever_waits_learns_the_cause(actor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, actor)
    may_run = pausable_steps(monkeypatch, pause_after=5)
    llm = open_tiny()
    stream = llm.stream(PROMPT, greedy(LONG))
    next(stream)
    bomb.is_armed = True
    if actor != "tokenizer":
        may_run.set()
    with pytest.raises(EngineFault, match=f"^the {actor} failed: Boom: it broke$") as raised:
        llm.generate([PROMPT] * 3, greedy(LONG))
    may_run.set()
    assert isinstance(raised.value.__cause__, Boom)
    with pytest.raises(EngineFault, match=f"the {actor} failed"):
        list(stream)
    with pytest.raises(EngineFault, match=f"the {actor} failed"):
        llm.stream(PROMPT)
    with pytest.raises(EngineFault, match=f"the {actor} failed"):
        llm.close()
    assert threads_of_ours() == []


def test_a_fault_is_told_even_when_the_engine_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "scheduler")
    llm = open_tiny()
    hub = llm._hub
    faults: list[object] = []

    def stop_as_soon_as_it_fails(fault: EngineFault) -> None:
        faults.append(fault)
        fail_all(fault)
        llm._thread._scope.cancel()

    fail_all = hub.mailboxes.fail_all
    monkeypatch.setattr(hub.mailboxes, "fail_all", stop_as_soon_as_it_fails)
    bomb.is_armed = True
    with pytest.raises(EngineFault, match="the scheduler failed"):
        llm.generate([PROMPT], greedy(2))
    assert len(faults) == 1
    with pytest.raises(EngineFault, match="the scheduler failed"):
        llm.close()


def test_generators_that_outlive_the_engine_are_silent() -> None:
    with open_tiny() as llm:
        stream = llm.stream(PROMPT, greedy(LONG))
        next(stream)
    del stream
    gc.collect()


def run_script(script: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


INTERRUPTED = """
import triode
llm = triode.LLM("random:tiny", kv_cache_bytes=2**21, dtype="float32", max_context_tokens=4096)

class Watch:
    def stage(self, name, total, unit):
        print("generating", flush=True)
    def advance(self, amount): ...
    def done(self): ...

llm._progress = Watch()
try:
    # More than whoever interrupts could ever wait for.
    llm.generate(["Once"] * 1000, triode.SamplingParams(max_tokens=4000, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted")
llm._progress = None
print(len(llm.generate(["Once"], triode.SamplingParams(max_tokens=3, ignore_eos=True))[0].completion.token_ids))
while llm.statistics().num_unfinished:
    pass
llm.close()
print("closed")
"""


def test_an_interrupt_cancels_generate_and_keeps_the_engine() -> None:
    process = run_script(INTERRUPTED)
    assert process.stdout is not None
    assert process.stdout.readline() == "generating\n"
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (said.split(), errors) == (["interrupted", "3", "closed"], "")


def test_an_interrupt_cancels_what_has_only_just_begun(llm: triode.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    post = llm._thread._post

    def interrupted(*call: Any, **options: Any) -> None:
        monkeypatch.undo()
        post(*call, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._thread, "_post", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT], greedy(LONG))
    wait_until_nothing_is_left(llm)
    assert llm.statistics().scheduler.num_steps < LONG


FORGOTTEN = """
import triode
llm = triode.LLM("random:tiny", kv_cache_bytes=2**21, dtype="float32")
for delta in llm.stream("Once", triode.SamplingParams(max_tokens=400, ignore_eos=True)):
    print("read")
    break
stream = llm.stream("Once", triode.SamplingParams(max_tokens=400, ignore_eos=True))
next(stream)
"""


def test_a_script_that_forgets_to_close_ends_quietly() -> None:
    process = run_script(FORGOTTEN)
    said, errors = process.communicate(timeout=60)
    assert (said, errors, process.returncode) == ("read\n", "", 0)
