"""Asking a runner about guides, in whichever thread or process it lives."""

from triode.models.guide import Guide
from triode.models.runner import Runner

MAX_COMPILING = 2
"""Guides that are compiled at a time, in threads: each takes a core for milliseconds, at worst for a fraction of a second."""


def refusal(runner: Runner, guide: Guide) -> str | None:
    """Why a guide cannot be followed; None if it can, and is compiled."""
    try:
        runner.check_guide(guide)
    except ValueError as error:
        return str(error)
    except Exception as error:  # whatever a compiler makes of one caller's guide, the others' engine goes on
        return f"guide cannot be compiled: {error!r}"
    return None
