"""A client for the Clore.ai GPU marketplace."""

from clore_client.client import CloreClient
from clore_client.commands import CommandResult, OutputLine
from clore_client.errors import (
    ApplicationError,
    AuthenticationError,
    BidTooLowError,
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreAPIError,
    CloreConnectionError,
    CloreError,
    ConfigurationError,
    CurrencyNotAllowedError,
    DatabaseError,
    FateUnknownError,
    InsufficientBalanceError,
    InvalidEndpointError,
    InvalidInputError,
    InvalidResponseError,
    OrderEndedError,
    OrderFateUnknownError,
    OrderNotFoundError,
    RateLimitError,
    RateUnknownError,
    RentalError,
    ServerAlreadyRentedError,
    ServerOfflineError,
    SpendingLimitError,
    SpotPriceStepError,
    SpotPriceTooSoonError,
    SSHError,
    WaitTimeoutError,
)
from clore_client.leftovers import Leftover, Leftovers
from clore_client.orders import Order
from clore_client.rental import Rental
from clore_client.servers import Server
from clore_client.signals import SignalExit
from clore_client.ssh_errors import (
    CommandError,
    CommandTimeoutError,
    HostKeyChangedError,
    TransferError,
)
from clore_client.transferred import Transferred
from clore_client.version import __version__
from clore_client.wallets import Wallet

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
    "FateUnknownError",
    "HostKeyChangedError",
    "InsufficientBalanceError",
    "InvalidEndpointError",
    "InvalidInputError",
    "InvalidResponseError",
    "Leftover",
    "Leftovers",
    "Order",
    "OrderEndedError",
    "OrderFateUnknownError",
    "OrderNotFoundError",
    "OutputLine",
    "RateLimitError",
    "RateUnknownError",
    "Rental",
    "RentalError",
    "SSHError",
    "Server",
    "ServerAlreadyRentedError",
    "ServerOfflineError",
    "SignalExit",
    "SpendingLimitError",
    "SpotPriceStepError",
    "SpotPriceTooSoonError",
    "TransferError",
    "Transferred",
    "WaitTimeoutError",
    "Wallet",
    "__version__",
]
