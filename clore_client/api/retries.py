"""Count the sends of one call, and decide when to give up."""

from __future__ import annotations

import math
import time

from clore_client.api.call import Call
from clore_client.api.rate_limit import DeadlinePassedError, PauseTooLongError
from clore_client.api.retry import Failure
from clore_client.errors import CloreConnectionError, CloreError, RateLimitError


class Retries:
    """What became of the sends of one call.

    Failures count against ``max_retries``. Refusals for the pace do not: they have a patience.

    Attributes:
        sends: how many times it was sent.
        failures: how many of them failed for another reason than the pace.
        refusals: how many were refused for their pace.
    """

    def __init__(self, max_retries: int, patience: float) -> None:
        self._max_retries = max(1, max_retries)
        self._patience = patience  # seconds from the first refusal on
        self._refused_at: float | None = None
        self._last: Failure | None = None
        self.sends = self.failures = self.refusals = 0

    def note(self, failure: Failure) -> None:
        """Take a send that failed."""
        self.sends += 1
        if failure.rate_limited:
            self.refusals += 1
            self._refused_at = self._refused_at or time.monotonic()
        else:
            self.failures += 1
        failure.error.sends = self.sends
        if self._last is not None and failure.error.sent_at is None:
            failure.error.sent_at = self._last.error.sent_at  # an earlier send did leave
        self._last = failure

    def patience_left(self) -> float:
        """Return the seconds that it may still wait after refusals for the pace."""
        if self._refused_at is None:
            return self._patience
        return max(0.0, self._refused_at + self._patience - time.monotonic())

    def raise_if_over(self, failure: Failure, recently_refused: tuple[int, int]) -> None:
        """Raise the error of a call that is not sent again."""
        if not failure.again:
            raise failure.error
        if not failure.rate_limited:
            if self.failures >= self._max_retries:
                raise self._gave_up(failure.error)
            return
        told = failure.error.retry_after or 0.0
        if self.patience_left() <= told:
            error = self._gave_up(failure.error)
            refused, of = recently_refused
            if refused > 1:
                error.args = (
                    f"{error}\n{refused} of the last {of} requests were refused for their pace: "
                    "other programs use this key. Let them share a rate limit with "
                    "rate_limiter='redis://...', or raise rate_limit=",
                )
            raise error

    def not_sent(self, call: Call, reason: DeadlinePassedError | PauseTooLongError) -> CloreError:
        """Make the error for a request that was not sent, or not again."""
        last = self._last
        if isinstance(reason, PauseTooLongError) and last is None:
            error = RateLimitError(
                5,
                endpoint=call.endpoint,
                hint=f"the API asked for a pause, of which {reason.seconds:.0f} s are left; "
                "nothing was sent",
            )
            error.retry_after, error.sends = reason.seconds, 0
            return error
        if last is None:
            return CloreConnectionError(
                f"{call.label} was not sent: its time was over before its turn came"
            )
        if isinstance(reason, PauseTooLongError) and reason.seconds < math.inf:
            last.error.retry_after = reason.seconds
        return self._gave_up(last.error)

    def _gave_up(self, error: CloreError) -> CloreError:
        """Return ``error``, saying that asking again did not help."""
        error.args = (f"Clore API request failed after {self.sends} retries: {error}",)
        return error
