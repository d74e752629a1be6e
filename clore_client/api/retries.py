"""Count the requests of one call, and decide when to give up."""

from __future__ import annotations

import time

from clore_client.api.call import Call
from clore_client.api.rate_limit import DeadlinePassedError, PauseTooLongError
from clore_client.api.retry import Failure
from clore_client.errors import CloreConnectionError, CloreError, RateLimitError


class Retries:
    """The failed requests of one call.

    Failures count against ``max_retries``. Refusals for the rate limit have a time limit instead.

    Attributes:
        sends: how many times the request was sent and failed.
        failures: how many of these failed for another reason than the rate limit.
        refusals: how many of these the API refused for the rate limit.
    """

    def __init__(self, call: Call, max_retries: int, patience: float) -> None:
        self._call = call
        self._max_retries = max(1, max_retries)
        self._patience = patience
        self._refused_at: float | None = None
        self._last: Failure | None = None
        self.sends = self.failures = self.refusals = 0

    @property
    def patience_left(self) -> float:
        """The seconds for which the call may still be refused for the rate limit."""
        if self._refused_at is None:
            return self._patience
        return max(0.0, self._refused_at + self._patience - time.monotonic())

    def add(self, failure: Failure) -> None:
        """Add a failed request."""
        self.sends += 1
        if failure.rate_limited:
            self.refusals += 1
            self._refused_at = self._refused_at or time.monotonic()
        else:
            self.failures += 1
        failure.error.sends = self.sends
        if self._last is not None and failure.error.sent_at is None:
            failure.error.sent_at = self._last.error.sent_at  # an earlier request was sent
        self._last = failure

    def check(self, failure: Failure, recently_refused: tuple[int, int]) -> None:
        """Raise the error of the call, unless its request may be sent again.

        Parameters:
            failure: the last failure.
            recently_refused: how many of the last requests with this key the API refused for the
                rate limit, and of how many.
        """
        if not failure.again:
            raise failure.error
        if not failure.rate_limited:
            if self.failures >= self._max_retries:
                raise self._gave_up(failure.error)
            return
        pause = 0.0 if self._call.urgent else failure.error.retry_after or 0.0
        if self.patience_left <= pause:
            raise _with_refusals(self._gave_up(failure.error), *recently_refused)

    def not_sent(self, reason: DeadlinePassedError | PauseTooLongError) -> CloreError:
        """Return the error for a request that could not be sent, or not again."""
        error = self._last.error if self._last is not None else None
        if error is None and isinstance(reason, PauseTooLongError):
            error = RateLimitError(
                5,
                endpoint=self._call.endpoint,
                hint=f"the API asked for a pause, so nothing was sent: try again in "
                f"{reason.seconds:.0f} s",
            )
            error.retry_after, error.sends = reason.seconds, 0
            return error
        if error is None:
            return CloreConnectionError(
                f"{self._call.label} was not sent, as the rate limit left no time for it before "
                "the deadline: allow more time, or make fewer requests"
            )
        if isinstance(reason, PauseTooLongError):
            error.retry_after = reason.seconds
        return self._gave_up(error)

    def _gave_up(self, error: CloreError) -> CloreError:
        """Add to the text of ``error`` that retries did not help."""
        error.args = (f"Clore API request failed after {self.sends} retries: {error}",)
        return error


def _with_refusals(error: CloreError, refused: int, total: int) -> CloreError:
    """Add to the text of ``error`` how many of the last requests were refused, and what to do."""
    if refused > 1:
        error.args = (
            f"{error}\n{refused} of the last {total} requests were refused for pace: other "
            "programs use this key. Stop them, share the rate limit with them "
            "(rate_limiter='redis://...'), or allow more time with rate_limit_wait=",
        )
    return error
