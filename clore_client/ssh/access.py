"""Log in to the machines of an account; check the host key of each order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clore_client.config import account_digest
from clore_client.models.order import Order
from clore_client.orders.account import AccountOrders, OrdersClient
from clore_client.ssh.address import check_order, parse_ssh_command, plain_address
from clore_client.ssh.connect import Login, check_connection, check_login_options
from clore_client.ssh.connection_pool import ConnectionPool
from clore_client.ssh.host_keys import HostKeys, KeyCheck, check_host_key
from clore_client.ssh.jobs import HostJobs
from clore_client.ssh.openssh import config_entry, rsync_line, terminal_line
from clore_client.ssh.transfer.options import check_path
from clore_client.validation import check_bool, check_number, check_text

if TYPE_CHECKING:
    import paramiko

LOGIN_WAIT = 120.0  # seconds for an sshd to respond


class SSHAccess:
    """SSH access to the machines of an account.

    Parameters:
        client: the client, for its API key and base URL.
        orders: the orders, for the passwords that were sent with them.
        folder: the state folder, or None if none is used.
    """

    def __init__(self, client: OrdersClient, orders: AccountOrders, folder: Path | None) -> None:
        self._client = client
        self._orders = orders
        self._folder = folder
        self._by_account: dict[str, HostKeys] = {}

    @property
    def _host_keys(self) -> HostKeys:
        """The host keys of the account; the client's API key may change."""
        account = account_digest(self._client.base_url, self._client.api_key)
        return self._by_account.setdefault(account, HostKeys(self._folder, account))

    def forget_host_key(self, order: Mapping[str, Any]) -> bool:
        """Forget the host key of an order; see ``CloreClient.forget_host_key``."""
        return self._host_keys.forget(self._alias(order))

    def terminal_line(self, order: Mapping[str, Any], key_path: Any) -> str:
        """Return a command line for OpenSSH; see ``CloreClient.ssh_command``."""
        return terminal_line(plain_address(order), self._host_keys, self._alias(order), key_path)

    def rsync_line(self, order: Mapping[str, Any], local: Any, remote: Any, key_path: Any) -> str:
        """Return a command line for rsync; see ``CloreClient.rsync_command``."""
        return rsync_line(
            plain_address(order), self._host_keys, self._alias(order), key_path,
            check_path("local", local), check_path("remote", remote),
        )  # fmt: skip

    def config_entry(self, order: Mapping[str, Any], name: str | None, key_path: Any) -> str:
        """Return an entry for OpenSSH's configuration; see ``CloreClient.ssh_config``."""
        address = plain_address(order)
        number = self._order_number(order)
        entry = name if name is not None else f"clore-{number}" if number else "clore"
        return config_entry(
            check_text("name", entry), address, self._host_keys, self._alias(order), key_path
        )

    def login(
        self,
        order: Mapping[str, Any],
        *,
        password: str | None = None,
        key_path: str | os.PathLike[str] | None = None,
        passphrase: str | None = None,
        wait: float = LOGIN_WAIT,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> Login:
        """Check the arguments of a login, and return it; nothing is sent."""
        address = plain_address(order)
        check_number("timeout", timeout, above=True, unit="seconds")
        check_number("wait", wait, infinite=True, unit="seconds")
        mode = check_host_key("host_key", host_key)
        if password is not None:
            check_text("password", password, secret=True)
        if passphrase is not None:
            check_text("passphrase", passphrase, secret=True)
        if key_path is not None and not isinstance(key_path, os.PathLike):
            check_text("key_path", key_path)
        if not password and not key_path:
            sent = self._orders.credentials.get(self._order_number(order) or 0, {})
            password = order.get("ssh_password") or sent.get("ssh_password")
        keys = KeyCheck(
            self._host_keys, self._order_number(order), "{host}:{port}".format(**address), mode
        )
        return Login(
            order,
            password=password,
            key_path=key_path,
            passphrase=passphrase,
            timeout=timeout,
            wait=wait,
            keys=keys,
            use_ssh_config=check_bool("use_ssh_config", use_ssh_config),
        )

    def connected(
        self,
        order: Mapping[str, Any],
        ssh: paramiko.SSHClient | None,
        login: dict[str, Any],
        timeout: float = 30.0,
        size: int = 1,
        eager: bool = True,
    ) -> ConnectionPool:
        """Return the caller's connection, or logins to make when the pool is entered."""
        options = check_login_options(login)
        if ssh is not None:
            return ConnectionPool(None, check_connection(ssh))
        return ConnectionPool(self.login(order, timeout=timeout, **options), None, size, eager)

    def jobs(
        self, order: Mapping[str, Any], ssh: paramiko.SSHClient | None, login: dict[str, Any]
    ) -> HostJobs:
        """Return the jobs of the machine of an order."""
        self.connected(order, ssh, login)  # check the arguments now

        def connect(seconds: float) -> ConnectionPool:
            wait = min(seconds, login.get("wait", LOGIN_WAIT))
            return self.connected(order, ssh, {**login, "wait": wait})

        return HostJobs(connect, reconnects=ssh is None)

    @staticmethod
    def _order_number(order: Mapping[str, Any]) -> int | None:
        return Order(order).id

    def _alias(self, order: Mapping[str, Any]) -> str:
        address = parse_ssh_command(check_order(order))
        return self._host_keys.alias(self._order_number(order), "{host}:{port}".format(**address))
