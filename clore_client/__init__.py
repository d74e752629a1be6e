"""A client for the Clore.ai GPU marketplace."""

from typing import TYPE_CHECKING, Any

from clore_client.client import CloreClient
from clore_client.config import __version__
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
    JobError,
    JobTimeoutError,
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
from clore_client.models.record import Wallet
from clore_client.models.server import Server
from clore_client.progress import ProgressEvent

if TYPE_CHECKING:
    from clore_client.market.search import SearchReport
    from clore_client.market.spot import SpotMarket, SpotOffer
    from clore_client.market.summary import CostEstimate, ModelSummary
    from clore_client.models.listing import OrderList, ServerList, WalletList
    from clore_client.models.result import CommandResult, OutputLine, TransferResult
    from clore_client.rental.group import RentalGroup
    from clore_client.rental.recovery import Leftover, Leftovers
    from clore_client.rental.rental import Rental
    from clore_client.rental.signals import SignalExit
    from clore_client.ssh.jobs import Job

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
    "CostEstimate",
    "CurrencyNotAllowedError",
    "DatabaseError",
    "HostKeyChangedError",
    "InsufficientBalanceError",
    "InvalidEndpointError",
    "InvalidInputError",
    "InvalidResponseError",
    "Job",
    "JobError",
    "JobTimeoutError",
    "Leftover",
    "Leftovers",
    "ModelSummary",
    "Order",
    "OrderEndedError",
    "OrderList",
    "OrderNotFoundError",
    "OrderOutcomeUnknownError",
    "OutcomeUnknownError",
    "OutputLine",
    "ProgressEvent",
    "RateLimitError",
    "RateUnknownError",
    "Rental",
    "RentalError",
    "RentalGroup",
    "SSHError",
    "SearchReport",
    "Server",
    "ServerAlreadyRentedError",
    "ServerList",
    "ServerOfflineError",
    "SignalExit",
    "SpendingLimitError",
    "SpotMarket",
    "SpotOffer",
    "SpotPriceStepError",
    "SpotPriceTooSoonError",
    "TransferError",
    "TransferResult",
    "UnknownOrderError",
    "WaitTimeoutError",
    "Wallet",
    "WalletList",
    "__version__",
]

_LAZY_NAMES = {
    "CommandResult": "models.result",
    "CostEstimate": "market.summary",
    "Job": "ssh.jobs",
    "Leftover": "rental.recovery",
    "Leftovers": "rental.recovery",
    "ModelSummary": "market.summary",
    "OrderList": "models.listing",
    "OutputLine": "models.result",
    "Rental": "rental.rental",
    "RentalGroup": "rental.group",
    "SearchReport": "market.search",
    "ServerList": "models.listing",
    "SignalExit": "rental.signals",
    "SpotMarket": "market.spot",
    "SpotOffer": "market.spot",
    "TransferResult": "models.result",
    "WalletList": "models.listing",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # These modules are imported on first use, which makes the import faster.
    if name in _LAZY_NAMES:
        import importlib

        return getattr(importlib.import_module(f"clore_client.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
