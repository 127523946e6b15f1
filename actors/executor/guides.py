"""Asking a runner about guides, in whichever thread or process it lives."""

from triode.errors import EngineBusy
from triode.models.guide import Guide, Refusal
from triode.models.runner import Runner


def refusal(runner: Runner, guide: Guide) -> Refusal | None:
    """Why a guide cannot be followed; None if it can, and is compiled and kept."""
    try:
        runner.check_guide(guide)
    except ValueError as error:
        return Refusal(str(error))
    except EngineBusy as error:
        return Refusal(str(error), is_busy=True)
    except Exception as error:  # whatever a compiler makes of one caller's guide, the others' engine goes on
        return Refusal(f"guide cannot be compiled: {error!r}")
    return None
