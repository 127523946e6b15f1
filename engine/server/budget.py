"""How much one key may still use of what it gets a minute."""


class Budget:
    """A bucket that holds a minute's worth and fills evenly. It may be overdrawn: then nothing is admitted until it is full
    enough again."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_second = per_minute / 60
        self._capacity = float(per_minute)
        self._left = self._capacity
        self._filled_at_s = now_s

    def spend(self, amount: float, now_s: float) -> None:
        """Take what was used, whether it was there or not."""
        self._fill(now_s)
        self._left -= amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much is there; 0 if it is."""
        self._fill(now_s)
        return max(0.0, (amount - self._left) / self._per_second)

    def _fill(self, now_s: float) -> None:
        self._left = min(self._capacity, self._left + (now_s - self._filled_at_s) * self._per_second)
        self._filled_at_s = now_s
