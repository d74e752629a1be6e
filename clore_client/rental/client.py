"""RentalClient, the interface to ``CloreClient`` that rentals use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from clore_client.models.order import Order
from clore_client.models.result import CommandResult, TransferResult
from clore_client.models.server import Server

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.tunnel import Forward


class RentalClient(Protocol):
    """The methods of ``CloreClient`` that a rental uses."""

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> list[Server]: ...

    def get_marketplace(self, include_rented: bool = False) -> list[Server]: ...

    def get_orders(self, include_completed: bool = False) -> list[Order]: ...

    def get_order(self, order_id: Any) -> Order | None: ...

    def cancel_order(self, order_id: Any, *, confirm: bool) -> bool: ...

    @property
    def ssh_command(self) -> Callable[..., str]: ...

    def get_spot_market(self, server_id: int) -> dict[str, Any]: ...

    def wait_for_order(self, order_id: int, timeout: float, poll_interval: float) -> Order: ...

    @property
    def create_order(self) -> Callable[..., Order]: ...

    @property
    def connect_ssh(self) -> Callable[..., paramiko.SSHClient]: ...

    @property
    def forward(self) -> Callable[..., Forward]: ...

    @property
    def run(self) -> Callable[..., CommandResult]: ...

    @property
    def upload(self) -> Callable[..., TransferResult]: ...

    @property
    def download(self) -> Callable[..., TransferResult]: ...
