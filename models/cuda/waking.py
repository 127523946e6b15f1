"""Waking: what a launch will use is touched while its plan is still being made.

Between two requests a processor sleeps, and forgets what was in its caches. Python then takes five times as long for a launch,
more than a millisecond on a slow host, in which the device waits. So a runner that hears of a request goes the way of
its launch beforehand, over a batch of its own: nothing that it does changes the batch on the device, and no kernel runs.

The plan of a short prompt may come before that is done. What is left would then be done twice, so it is left to the
launch.
"""

from collections.abc import Callable

import numpy as np
import torch

from triode.ids import BlockId, SlotId, StepId, pack_tokens
from triode.models.cuda.arena import ArenaLayout, Changes, Words
from triode.models.cuda.batch import HostBatch, PackedRows, is_decode
from triode.models.cuda.gpu import Gpu, Mark
from triode.models.cuda.programs import prefill_shape
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, StepPlan, TableChange

_NUM_TOKENS = 2
_NUM_BLOCKS = 1


class Waking:
    """A batch of one sequence, and what sends it to the device."""

    def __init__(self, block_size_tokens: int, gpu: Gpu) -> None:
        """Belongs in `Gpu.active()`."""
        layout = ArenaLayout(num_slots=1, num_rows=1, num_entries=_NUM_BLOCKS)
        self._gpu = gpu
        self._host = HostBatch(layout, _NUM_TOKENS + 1, block_size_tokens)
        self._changes = Changes(layout)
        self._num_plans = 0
        self._sent_at: Mark | None = None
        words = self._joined(self._packed(self._applied()))
        self._sent = torch.zeros(len(words), dtype=torch.int32, device=gpu.device)

    def wake(self, has_come: Callable[[], bool]) -> None:
        """Plan, pack and send, unless what was sent last is still under way; a plan that has come ends it."""
        if self._sent_at is not None:
            if not self._sent_at.is_passed():
                return
            self._sent_at.release()
            self._sent_at = None
        plan = self._applied()
        if has_come():
            return
        packed = self._packed(plan)
        if has_come():
            return
        words = self._joined(packed)
        if has_come():
            return
        self._gpu.upload(words, self._sent)
        self._sent_at = self._gpu.end_step()

    def _applied(self) -> StepPlan:
        # Of a wake that was cut short.
        self._changes.take()
        plan = self._plan()
        with self._host.lock:
            self._host.apply(plan, self._changes)
        return plan

    def _packed(self, plan: StepPlan) -> PackedRows:
        assert not is_decode(plan), "a prompt is read"
        with self._host.lock:
            slot_R, start_R, end_R = self._host.check(plan, every_row_samples=False)
            return self._host.pack(plan, slot_R, start_R, end_R, prefill_shape(_NUM_TOKENS, 1, 1))

    def _joined(self, packed: PackedRows) -> Words:
        changed = self._changes.take()
        assert changed is not None, "an admission changes the arena"
        return np.concatenate([changed, packed.words])

    def _plan(self) -> StepPlan:
        self._num_plans += 1
        slot, epoch = SlotId(0), self._num_plans
        admission = Admission(
            slot=slot,
            epoch=epoch,
            packed_ids=pack_tokens([0] * _NUM_TOKENS),
            num_prompt_tokens=_NUM_TOKENS,
            params=SamplingParams(),
            seed=0,
            sample_index=0,
            stop_token_ids=(),
        )
        return StepPlan(
            step_id=StepId(epoch),
            slots=(slot,),
            epochs=(epoch,),
            start_positions=(0,),
            num_query_tokens=(_NUM_TOKENS,),
            outputs=(Output.SAMPLE,),
            admissions=(admission,),
            table_changes=(TableChange(slot, 0, (BlockId(1),) * _NUM_BLOCKS),),
        )
