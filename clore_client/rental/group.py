"""Rent several servers at once, and end them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from clore_client.errors import CancelUnconfirmedError, CloreError, RentalError, add_note
from clore_client.log import logger
from clore_client.models.result import CommandResult
from clore_client.rental.rental import Rental
from clore_client.rental.selection import summary
from clore_client.rental.signals import BlockExit, SignalHandling, in_main_thread

GroupResult = TypeVar("GroupResult")


class RentalGroup:
    """Begin and end several rentals together; see ``CloreClient.rent_many``.

    It is a sequence of the rentals that run: ``len(rentals)``, ``rentals[0]``, ``for rental in
    rentals``.

    Parameters:
        rentals: the rentals, which have not begun.
        min_count: how many must run.
    """

    def __init__(self, rentals: list[Rental], min_count: int) -> None:
        self._all = rentals
        for rental in rentals[1:]:
            rental.share_with(rentals[0])
        self._min_count = min_count
        self._running: list[Rental] = []
        self._signals: SignalHandling | None = None
        self._started = False

    def __len__(self) -> int:
        return len(self._running)

    def __getitem__(self, number: int) -> Rental:
        return self._running[number]

    def __iter__(self) -> Iterator[Rental]:
        return iter(list(self._running))

    def __repr__(self) -> str:
        return f"<RentalGroup of {len(self._all)}: {self._running}>"

    # --- for users ---

    @property
    def cost_usd(self) -> float:
        """The cost so far of all rentals, in USD; see :attr:`Rental.cost_usd`."""
        return sum(rental.cost_usd for rental in self._all)

    def run(self, command: str | Sequence[str], **options: Any) -> list[CommandResult]:
        """Run a command on all servers at once; see :meth:`Rental.run`.

        Returns:
            A list with the result of each rental, in their order.

        Raises:
            CommandError: the command failed on one server; on the others, it has ended too.
        """
        return self.map(lambda rental: rental.run(command, **options))

    def map(self, function: Callable[[Rental], GroupResult]) -> list[GroupResult]:
        """Call a function with each rental, each in a thread of its own.

        After Ctrl-C, the SSH connections of the rentals are closed.

        Returns:
            A list with the result for each rental, in their order.

        Example:
            >>> rentals.map(lambda rental: rental.upload("train.py", "work/"))
        """
        from concurrent.futures import ThreadPoolExecutor, wait  # slow to import

        with ThreadPoolExecutor(max(1, len(self._running))) as pool:
            calls = [pool.submit(function, rental) for rental in self._running]
            try:
                wait(calls)
            except BaseException:
                for rental in self._running:
                    rental.close_ssh()
                raise
        return [call.result() for call in calls]

    # --- the block ---

    def end_with(self, leave: Callable[..., None]) -> None:
        """End all rentals when ``leave``, the end of a ``with`` statement, no longer exists."""
        for rental in self._all:
            rental.end_with(leave)

    def __enter__(self) -> RentalGroup:
        # The rentals begin in other threads, for which only the main thread can handle signals.
        if self._started:
            raise RentalError("a group of rentals can be entered only once: call rent_many() again")
        self._started = True
        self._signals = SignalHandling() if in_main_thread() else None
        try:
            self._begin()
        except BaseException as error:
            self._end(type(error), error)
            raise
        return self

    __exit__ = BlockExit()

    def _begin(self) -> None:
        """Begin all rentals at once, and wait until enough of them run."""
        from concurrent.futures import ThreadPoolExecutor, as_completed

        servers = self._all[0].servers
        if (found := servers.count()) < self._min_count:
            raise RentalError(
                f"at least {self._min_count} servers must run, and {found} fit the filters: ask "
                "for fewer, or change the filters"
                if found
                else servers.no_server
            )
        pool = ThreadPoolExecutor(len(self._all), "clore-rent-many")
        calls = [pool.submit(rental.start) for rental in self._all]
        pool.shutdown(wait=False)
        failed: list[BaseException] = []
        for call in as_completed(calls):
            if (error := call.exception()) is None:
                continue
            if not isinstance(error, CloreError):
                raise error  # for example one that on_progress raised
            failed.append(error)
            if len(self._all) - len(failed) < self._min_count:
                raise self._too_few(failed)
        self._running = [r for r, c in zip(self._all, calls, strict=True) if not c.exception()]
        for error in failed:
            logger.warning("%d of %d rentals run: %s", len(self._running), len(calls), error)

    def _too_few(self, errors: list[BaseException]) -> BaseException:
        """Return the error for a group in which too few rentals run."""
        serious = [error for error in errors if type(error) is not RentalError]
        if serious:
            return serious[0]
        tried = [pair for rental in self._all for pair in rental.tried]
        reasons = summary(tried) if tried else str(errors[0])
        return RentalError(
            f"{len(self._all)} servers were wanted, at least {self._min_count} must run, and "
            f"{len(errors)} rentals failed, so none is rented: {reasons}",
            tried=tuple(tried),
        )

    def _end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """End all rentals at once, and raise one error for those that failed."""
        self._running = []
        for rental in self._all:
            rental.request_end()
        failures: list[BaseException] = []
        for rental in self._all:
            try:
                rental.__exit__(kind, error, trace)
            except BaseException as failure:
                failures.append(failure)
        if self._signals is not None:
            self._signals.close()
        if failures:
            _raise_first(error, failures)


def _raise_first(error: BaseException | None, failures: list[BaseException]) -> None:
    """Raise the most serious failure, with the others as notes."""
    unconfirmed = [f for f in failures if isinstance(f, CancelUnconfirmedError)]
    # An interrupt comes first. The sort keeps the order of the others.
    first, *others = sorted(failures, key=lambda failure: isinstance(failure, Exception))
    if len(unconfirmed) > 1 and isinstance(first, Exception):
        ids = tuple(order_id for failure in unconfirmed for order_id in failure.order_ids)
        first = CancelUnconfirmedError("; ".join(map(str, unconfirmed)), order_ids=ids)
        others = [f for f in failures if not isinstance(f, CancelUnconfirmedError)]
    for other in others:
        add_note(first, str(other))
    raise first from error
