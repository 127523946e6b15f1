"""Whether weights fit into memory, asked before any of them is read."""

import torch

from triode.cache.pool import free_memory_bytes
from triode.errors import InsufficientMemory
from triode.models.parallel import RankOrder


def check_room(what: str, needed_bytes: int, device: torch.device, ranks: RankOrder | None, setting: str) -> None:
    """Refuse weights that do not fit.

    Args:
        what: names them in messages.
        needed_bytes: what they take.
        device: where they are to be.
        ranks: those that load as much at the same time, if this is one's share.
        setting: which one, besides the model, makes them smaller.

    Raises:
        InsufficientMemory: naming what to change.
    """
    if needed_bytes > (free_bytes := free_memory_bytes(device)):
        raise InsufficientMemory(
            f"{what} take {needed_bytes / 1e9:.2f} GB, and {device} has {free_bytes / 1e9:.2f} GB free: "
            f"choose a smaller model or {setting}"
        )
    if ranks is not None and needed_bytes * ranks.num_ranks > ranks.free_bytes:
        raise InsufficientMemory(
            f"{what} take {needed_bytes / 1e9:.2f} GB in each of {ranks.num_ranks} processes, and there "
            f"were {ranks.free_bytes / 1e9:.2f} GB free for all of them: choose a smaller model or {setting}"
        )
