"""RentalClient, the interface to ``CloreClient`` that rentals use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from clore_client.models.order import Order
from clore_client.models.result import CommandResult, TransferResult

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.tunnel import Forward


class RentalClient(Protocol):
    """The methods of ``CloreClient`` that a rental uses."""

    def get_orders(self, include_completed: bool = False) -> list[Order]: ...

    def get_order(self, order_id: Any) -> Order | None: ...

    def cancel_order(self, order_id: Any, *, confirm: bool) -> bool: ...

    @property
    def ssh_command(self) -> Callable[..., str]: ...

    def get_spot_market(self, server_id: int) -> dict[str, Any]: ...

    def wait_for_order(
        self, order_id: int, timeout: float, poll_interval: float, *, on_progress: Any = None
    ) -> Order: ...

    @property
    def create_order(self) -> Callable[..., Order]: ...

    @property
    def connect_ssh(self) -> Callable[..., paramiko.SSHClient]: ...

    @property
    def forward(self) -> Callable[..., Forward]: ...

    @property
    def shell(self) -> Callable[..., int]: ...

    @property
    def run(self) -> Callable[..., CommandResult]: ...

    @property
    def upload(self) -> Callable[..., TransferResult]: ...

    @property
    def download(self) -> Callable[..., TransferResult]: ...
