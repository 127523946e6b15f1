"""What an executor hands over, to be waited for."""

import trio

from triode.models.step import StepResult


class Inboxes:
    """Results and faults in the order in which they came."""

    def __init__(self) -> None:
        self._send_result, self.results = trio.open_memory_channel[StepResult](100)
        self._send_fault, self.faults = trio.open_memory_channel[BaseException](100)

    def put(self, result: StepResult) -> None:
        self._send_result.send_nowait(result)

    def fault(self, error: BaseException) -> None:
        self._send_fault.send_nowait(error)

    async def token(self) -> int:
        """Of the next result."""
        (token_id,) = (await self.results.receive()).token_ids
        return token_id
