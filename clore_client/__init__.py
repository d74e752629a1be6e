"""A client for the Clore.ai GPU marketplace."""

from typing import TYPE_CHECKING, Any

from clore_client.client import CloreClient
from clore_client.errors import (
    ApplicationError,
    AuthenticationError,
    BidTooLowError,
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreAPIError,
    CloreConnectionError,
    CloreError,
    CommandError,
    CommandTimeoutError,
    ConfigurationError,
    CurrencyNotAllowedError,
    DatabaseError,
    HostKeyChangedError,
    InsufficientBalanceError,
    InvalidEndpointError,
    InvalidInputError,
    InvalidResponseError,
    OrderEndedError,
    OrderNotFoundError,
    OrderOutcomeUnknownError,
    OutcomeUnknownError,
    RateLimitError,
    RateUnknownError,
    RentalError,
    ServerAlreadyRentedError,
    ServerOfflineError,
    SpendingLimitError,
    SpotPriceStepError,
    SpotPriceTooSoonError,
    SSHError,
    TransferError,
    UnknownOrderError,
    WaitTimeoutError,
)
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, OutputLine, TransferResult
from clore_client.models.server import Server
from clore_client.models.wallet import Wallet
from clore_client.version import __version__

if TYPE_CHECKING:
    from clore_client.rental.group import RentalGroup
    from clore_client.rental.recovery import Leftover, Leftovers
    from clore_client.rental.rental import Rental
    from clore_client.rental.signals import SignalExit

__all__ = [
    "ApplicationError",
    "AuthenticationError",
    "BidTooLowError",
    "BudgetExceededError",
    "CancelUnconfirmedError",
    "CloreAPIError",
    "CloreClient",
    "CloreConnectionError",
    "CloreError",
    "CommandError",
    "CommandResult",
    "CommandTimeoutError",
    "ConfigurationError",
    "CurrencyNotAllowedError",
    "DatabaseError",
    "HostKeyChangedError",
    "InsufficientBalanceError",
    "InvalidEndpointError",
    "InvalidInputError",
    "InvalidResponseError",
    "Leftover",
    "Leftovers",
    "Order",
    "OrderEndedError",
    "OrderNotFoundError",
    "OrderOutcomeUnknownError",
    "OutcomeUnknownError",
    "OutputLine",
    "RateLimitError",
    "RateUnknownError",
    "Rental",
    "RentalError",
    "RentalGroup",
    "SSHError",
    "Server",
    "ServerAlreadyRentedError",
    "ServerOfflineError",
    "SignalExit",
    "SpendingLimitError",
    "SpotPriceStepError",
    "SpotPriceTooSoonError",
    "TransferError",
    "TransferResult",
    "UnknownOrderError",
    "WaitTimeoutError",
    "Wallet",
    "__version__",
]

_LAZY_NAMES = {
    "Leftover": "recovery",
    "Leftovers": "recovery",
    "Rental": "rental",
    "RentalGroup": "group",
    "SignalExit": "signals",
}


def __getattr__(name: str) -> Any:
    # The rental modules are imported on first use, which makes the import faster.
    if name in _LAZY_NAMES:
        import importlib

        return getattr(importlib.import_module(f"clore_client.rental.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
