"""Log in to the hosts of an account, and keep their host keys."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clore_client.errors import CloreError, OrderEndedError, Secret
from clore_client.log import logger
from clore_client.market.market import LOGIN_OUTCOMES, HostHistory
from clore_client.models.order import Order
from clore_client.orders.account import AccountOrders, ended_error
from clore_client.ssh.connect import ConnectionPool, Login
from clore_client.ssh.jobs import LEAST_PATIENCE, HostJobs
from clore_client.ssh.keys import HostKeys, KeyCheck, check_host_key, private_key_of
from clore_client.ssh.openssh import OpenSSH, parse_ssh_command, plain_address, whole_key_path
from clore_client.validation import check_bool, check_number, check_order_id, check_text, short_repr

if TYPE_CHECKING:
    import paramiko


# The arguments of a login, for methods that do more than log in.
LOGIN_DEFAULTS: dict[str, Any] = {
    "password": None,
    "key_path": None,
    "passphrase": None,
    "wait": 120.0,  # seconds for an sshd to respond
    "host_key": "pin",
    "use_ssh_config": False,
}


def check_login_options(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of a login, and return all of them."""
    for name in given:
        if name not in LOGIN_DEFAULTS:
            raise TypeError(
                f"there is no argument {name!r}; the arguments for the login are "
                f"{', '.join(sorted(LOGIN_DEFAULTS))}"
            )
    options = {**LOGIN_DEFAULTS, **given}
    check_number("wait", options["wait"], infinite=True, unit="seconds")
    for name in ("password", "passphrase"):
        if options[name] is not None:
            check_text(name, options[name], secret=True)
    if options["key_path"] is not None:
        options["key_path"] = whole_key_path(options["key_path"])
    check_bool("use_ssh_config", options["use_ssh_config"])
    options["host_key"] = check_host_key(options["host_key"])
    return options


def check_connection(ssh: Any) -> Any:
    """Check a connection that the caller gave."""
    if not callable(getattr(ssh, "get_transport", None)):
        raise TypeError(f"ssh must be a paramiko.SSHClient, not {short_repr(ssh)}")
    return ssh


def _id_of(order: Any) -> int | None:
    """Return the id of an order; None if it is a record without one."""
    return Order(order).id if isinstance(order, Mapping) else check_order_id("order", order)


class SSHAccess:
    """Log in to the hosts of an account.

    Parameters:
        orders: the orders, for the passwords that were sent with them.
        folder: the state folder, or None if none is used.
        history: records hosts without sshd, and those that refuse the saved login.
    """

    def __init__(self, orders: AccountOrders, folder: Path | None, history: HostHistory) -> None:
        self._orders = orders
        self._folder = folder
        self._history = history
        self._by_account: dict[str, HostKeys] = {}

    @property
    def _host_keys(self) -> HostKeys:
        """Return the host keys of the account; the client's API key may change."""
        account = self._orders.account
        return self._by_account.setdefault(account, HostKeys(self._folder, account))

    def _with_address(self, order: Any) -> Order:
        """Return an order with its address. If the argument has no address, read the order.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.
        """
        if not isinstance(order, Mapping):
            return self._orders.running(check_order_id("order", order))
        record = order if isinstance(order, Order) else Order(order)
        if record.id is None:
            return record
        if record.has_ended:
            raise ended_error(record.id, record.status or "", record)
        self._orders.check_not_ended(record.id)
        if record.ssh_command:
            return record
        try:
            return self._orders.running(record.id)
        except OrderEndedError:
            raise
        except CloreError as error:
            logger.debug("order %d can't be read: %s", record.id, error)
            return record

    def forget_host_key(self, order: Any) -> bool:
        """Forget the host key of an order; see ``CloreClient.forget_host_key``."""
        alias = self._host_keys.alias(_id_of(order), parse_ssh_command(order))
        return self._host_keys.forget(alias)

    def openssh(self, order: Any, key_path: Any) -> OpenSSH:
        """Return a writer of command lines and configuration entries for OpenSSH."""
        order = self._with_address(order)
        return OpenSSH(order, self._host_keys, key_path or self._key_of(order)[0])

    def _key_of(self, order: Order) -> tuple[str | None, Any]:
        """Return the private key of the public key that was sent with an order.

        Returns:
            Its file, or a key of the SSH agent; None for both if there is none.
        """
        fingerprint = self._orders.login_of(order).get("key_fingerprint")
        return (None, None) if fingerprint is None else private_key_of(fingerprint)

    def login(self, order: Any, given: dict[str, Any], timeout: float = 30.0) -> Login:
        """Check the arguments of a login, and return it.

        Parameters:
            given: the arguments, without those that have their defaults.
            timeout: seconds for each attempt.
        """
        check_number("timeout", timeout, above=True, unit="seconds")
        options = check_login_options(given)
        order = self._with_address(order)
        agent_key, own = None, bool(options["password"] or options["key_path"])
        if not own:
            options["password"] = Secret.of(
                order.get("ssh_password") or self._orders.login_of(order).get("ssh_password")
            )
            if not options["password"]:
                options["key_path"], agent_key = self._key_of(order)
        address = plain_address(order)
        keys = KeyCheck(self._host_keys, order.id, address, options["host_key"])

        def on_failure(error: BaseException) -> None:
            self._raise_if_ended(order.id, error)
            if not own:  # else it may be the user's mistake
                outcome = LOGIN_OUTCOMES.get(getattr(error, "reason", ""))
                self._history.record(order.server_id, outcome)

        return Login(address, keys, {**options, "timeout": timeout}, agent_key, on_failure)

    def _raise_if_ended(self, order_id: int | None, error: BaseException) -> None:
        """Raise a better error if a connection failed because the order has ended."""
        if order_id is not None:
            self._orders.raise_if_ended(order_id, error)

    def connected(
        self, order: Any, ssh: paramiko.SSHClient | None, login: dict[str, Any],
        timeout: float = 30.0, size: int = 1, eager: bool = True, deadline: float | None = None,
    ) -> ConnectionPool:  # fmt: skip
        """Return the caller's connection, or logins to make when the pool is entered.

        Parameters:
            deadline: seconds that limit the login too.
        """
        options = check_login_options(login)
        if ssh is not None:
            on_failure = functools.partial(self._raise_if_ended, _id_of(order))
            return ConnectionPool(None, on_failure, check_connection(ssh))
        if deadline is not None:
            timeout, options["wait"] = min(timeout, deadline), min(options["wait"], deadline)
        checked = self.login(order, options, timeout)
        return ConnectionPool(checked, checked.on_failure, None, size, eager)

    def jobs(self, order: Any, ssh: paramiko.SSHClient | None, login: dict[str, Any]) -> HostJobs:
        """Return the jobs of the host of an order."""
        options = check_login_options(login)
        if ssh is None:
            order = self._with_address(order)  # once, and not for each connection
            self.login(order, login)  # check the arguments now

        def connect(seconds: float) -> ConnectionPool:
            limited = {**options, "wait": min(seconds, options["wait"])}
            return self.connected(order, ssh, limited, deadline=max(seconds, LEAST_PATIENCE))

        return HostJobs(connect, reconnects=ssh is None)
