"""A response as it begins."""

from collections.abc import Callable

import pytest

from triode.engine.server.responses.objects import Response


@pytest.fixture
def a_response() -> Callable[[str], Response]:
    def make(name: str) -> Response:
        return Response(
            id=name,
            created_at=0,
            model="m",
            instructions=None,
            previous_response_id=None,
            tools=(),
            tool_choice="auto",
            parallel_tool_calls=True,
            text={},
            temperature=1,
            top_p=1,
            presence_penalty=0,
            frequency_penalty=0,
            max_output_tokens=None,
            metadata={},
            store=True,
        )

    return make
