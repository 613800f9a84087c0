"""Pauses between attempts that fail, which grow so that a fault that stays costs little."""

import time

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 30.0


class Pauses:
    """Counts failed attempts in a row; each pause is twice as long as the one before."""

    def __init__(self) -> None:
        self.failures = 0
        self.failed_at = 0.0  # monotonic seconds

    def fail(self) -> None:
        """Count a failed attempt."""
        self.failures += 1
        self.failed_at = time.monotonic()

    def reset(self) -> None:
        """Forget the failures after an attempt that succeeded."""
        self.failures = 0

    def seconds(self) -> float:
        """Return the length of the current pause, 0 without failures."""
        return min(FIRST_SECONDS * 2.0 ** min(self.failures - 1, 30), LONGEST_SECONDS) if self.failures else 0.0

    def is_over(self) -> bool:
        """Return whether the next attempt may be made."""
        return time.monotonic() >= self.failed_at + self.seconds()
