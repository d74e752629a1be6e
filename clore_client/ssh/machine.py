"""The part of the client that works on rented machines, over SSH."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clore_client.config import account_digest, state_folder
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, OutputLine, TransferResult
from clore_client.orders.account import Account
from clore_client.validation import check_bool, check_number, check_text

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.connect import ConnectionPool, Login
    from clore_client.ssh.host_keys import HostKeys
    from clore_client.ssh.tunnel import Forward

PathArgument = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]


class Machine(Account):
    """Logging in, running commands, and moving data."""

    @property
    def _pins(self) -> HostKeys:
        """The host keys of the account's orders."""
        from clore_client.ssh.host_keys import HostKeys

        account = account_digest(self._base_url, self.api_key)
        pins: dict[str, HostKeys] = self.__dict__.setdefault("_host_keys", {})
        return pins.setdefault(account, HostKeys(state_folder(self._state_dir), account))

    # --- getting in ---

    @staticmethod
    def parse_ssh_connection(order: Any) -> dict[str, Any]:
        """Where to log in, from an order's ``connection.ssh``. Never raises.

        Parameters:
            order: an order in the documented form.

        Returns:
            ``{"host", "port", "user", "raw"}``: ``""``, 22 and ``"root"`` where it does not say,
            and the string as it came. A host or user that is not a plain name or address counts
            as none.

        Example:
            >>> CloreClient.parse_ssh_connection({"connection": {"ssh": "ssh root@h.net -p 2060"}})
            {'host': 'h.net', 'port': 2060, 'user': 'root', 'raw': 'ssh root@h.net -p 2060'}
        """
        from clore_client.ssh.connect import parse_ssh_command

        return parse_ssh_command(order)

    def connect_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> paramiko.SSHClient:
        """Log in to the machine of a running order. Needs paramiko.

        A password wins over ``key_path``. With neither: the password that stands in the order, or
        that this client sent with it; else the SSH agent and the user's default keys. The agent
        is never forwarded, nor is X11.

        Parameters:
            order: a running order, as :meth:`wait_for_order` returns it.
            password: of the user in ``connection.ssh``.
            key_path: file of a private key: Ed25519, ECDSA or RSA.
            passphrase: of that key, where it is encrypted.
            wait: seconds that the machine's sshd may take to come up.
            timeout: seconds for each attempt to log in.
            host_key: ``"pin"`` keeps the key that the machine shows at the first login to this
                order, in the state folder too where that is in use, and insists on it from then
                on; a fingerprint (``"SHA256:..."``) insists on that one, and pins it;
                ``"accept"`` takes whatever is shown.
            use_ssh_config: take ``ProxyJump`` and ``IdentityFile`` for the host from
                ``~/.ssh/config``. A jump host must be in ``~/.ssh/known_hosts``.

        Returns:
            A connected ``paramiko.SSHClient``, which the caller closes.

        Raises:
            SSHError: there is no address yet, nothing answered in time, or the login was refused.
            HostKeyChangedError: another key than before for this order; nothing was sent.
            ValueError: ``key_path`` or ``passphrase`` can't be used, among others.
            ImportError: paramiko is not installed.

        Example:
            >>> with client.connect_ssh(order) as ssh:
            ...     print(ssh.exec_command("nvidia-smi -L")[1].read().decode())
        """
        return self._login(
            order,
            password=password,
            key_path=key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
            use_ssh_config=use_ssh_config,
        ).open()

    def wait_for_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 300.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> None:
        """Return when a login works; parameters and errors are those of :meth:`connect_ssh`.

        Example:
            >>> client.wait_for_ssh(order, wait=600)
        """
        self.connect_ssh(
            order,
            password,
            key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
            use_ssh_config=use_ssh_config,
        ).close()

    def forget_host_key(self, order: Mapping[str, Any]) -> bool:
        """Forget the host key that is pinned for an order: the next login takes a new one.

        Parameters:
            order: whose container was started anew, which may make new keys.

        Returns:
            Whether there was one.

        Example:
            >>> client.forget_host_key(order)
            True
        """
        return self._pins.forget(self._alias(order))

    def ssh_command(self, order: Mapping[str, Any], *, key_path: PathArgument | None = None) -> str:
        """The line that logs in from a terminal, quoted for a shell.

        Where the host key is pinned in the state folder, OpenSSH is told to insist on it.

        Parameters:
            order: a running order.
            key_path: file of a private key, to be named in the line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_command(order))
            ssh -p 2060 root@n1.us.clorecloud.net
        """
        from clore_client.ssh.connect import plain_address
        from clore_client.ssh.openssh import terminal_line

        return terminal_line(plain_address(order), self._pins, self._alias(order), key_path)

    def ssh_config(
        self,
        order: Mapping[str, Any],
        *,
        name: str | None = None,
        key_path: PathArgument | None = None,
    ) -> str:
        """An entry for ``~/.ssh/config``, for rsync, VS Code and tmux.

        It insists on the pinned host key; without one yet, OpenSSH pins the first that it sees, in
        the same place.

        Parameters:
            order: a running order.
            name: of the entry, as in ``ssh <name>``; ``clore-<order id>`` by default.
            key_path: file of a private key.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_config(order), file=open("gpu.conf", "w"))
        """
        from clore_client.ssh.connect import plain_address
        from clore_client.ssh.openssh import config_entry

        address = plain_address(order)
        number = self._order_number(order)
        entry = name if name is not None else f"clore-{number}" if number else "clore"
        return config_entry(
            check_text("name", entry), address, self._pins, self._alias(order),
            key_path,
        )  # fmt: skip

    # --- running work ---

    def run(
        self,
        order: Mapping[str, Any],
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None,
        max_output: int = 64 * 1024 * 1024,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> CommandResult:
        """Run a command on the machine of an order, and wait for its end. Needs paramiko.

        Parameters:
            order: a running order.
            command: for the shell of the machine; a list of arguments is quoted.
            check: raise for another exit code than 0.
            timeout: seconds after the login, when the command is ended; None waits for ever. An
                attempt to log in gets no longer, either. Ctrl-C ends the command, too.
            input: what it reads from its standard input.
            env: environment variables.
            on_output: called with each line as it comes, without its line end; the line's
                ``stream`` is ``"stdout"`` or ``"stderr"``.
            max_output: bytes of output that are kept; what comes after goes to ``on_output`` only,
                and is counted in the result's ``dropped``.
            ssh: a connection to use, as :meth:`connect_ssh` returns it; it stays open.
            **login: ``password``, ``key_path``, ``passphrase``, ``wait``, ``host_key``,
                ``use_ssh_config``, as for
                :meth:`connect_ssh`.

        Returns:
            A :class:`CommandResult`: ``command``, ``exit_code``, ``stdout``, ``stderr`` (text;
            bytes that are no UTF-8 are replaced), ``duration`` in seconds, and ``dropped``.

        Raises:
            CommandError: the exit code was not 0; ``result`` has it all.
            CommandTimeoutError: it did not end in time, and was ended.
            SSHError: the login failed; the machine did not run the command, as with a command of
                its own (ForceCommand); or the connection broke, and the command may still run.

        Example:
            >>> print(client.run(order, "nvidia-smi -L").stdout)
            GPU 0: NVIDIA GeForce RTX 4090
        """
        from clore_client.ssh.command import check_run_arguments, run_command

        options: dict[str, Any] = {
            "check": check, "timeout": timeout, "input": input, "env": env, "on_output": on_output,
            "max_output": max_output,
        }  # fmt: skip
        check_run_arguments(command, **options)
        login_timeout = min(30.0, timeout or 30.0)
        with self._connected(order, ssh, login, login_timeout) as pool:
            return run_command(pool.ssh, command, **options)

    def forward(
        self,
        order: Mapping[str, Any],
        remote_port: int,
        local_port: int = 0,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Forward:
        """Forward a port of this machine, on loopback only, to one of an order's machine.

        Parameters:
            order: a running order.
            remote_port: on the machine, where something listens.
            local_port: here; 0 takes a free one.
            ssh, **login: as for :meth:`run`.

        Returns:
            A context manager that yields the local port, forwarded until the block is left.

        Example:
            >>> with client.forward(order, 8888) as port:
            ...     print(requests.get(f"http://127.0.0.1:{port}").status_code)
        """
        from clore_client.ssh.connect import check_connection, check_login_options
        from clore_client.ssh.tunnel import Forward, check_forward_arguments

        check_forward_arguments(remote_port, local_port)
        if ssh is None:
            connection = self._login(order, **check_login_options(login)).open()
        else:
            connection = check_connection(ssh)
        return Forward(connection, remote_port, local_port, owns=ssh is None)

    # --- moving data ---

    def upload(
        self,
        order: Mapping[str, Any],
        local: PathArgument,
        remote: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        streams: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a whole directory to the machine of an order. Needs paramiko.

        As with ``cp -r``, what is copied to a directory that exists is put into it. It is sent
        under a temporary name, and renamed when it is complete. Sizes are compared always, and
        SHA-256 where ``verify`` says so, the transfer was resumed, or a file went in several
        pieces. A host without a usual shell gets it over SFTP, which is slower. A new file has
        the permissions of the local one, less the host's umask; one that is replaced keeps its
        own. A ``remote`` that is a symlink is an error, unless ``symlinks="follow"``.

        Parameters:
            order: a running order.
            local: a file or directory here.
            remote: a path there; a relative one and ``~`` count from the home directory.
            preserve: keep permissions and times.
            verify: compare SHA-256 of every file.
            resume: keep what was transferred before an error, and continue there. A source whose
                size or time has changed starts over.
            symlinks: of those within a directory that lead to something in it: ``"skip"`` leaves
                them out, ``"copy"`` makes the same symlinks there, ``"follow"`` sends what they
                lead to. All others are left out; ``skipped`` names them.
            streams: connections at once, 1 to 16; None chooses by the size.
            progress: called as ``progress(name, done, total)``, in bytes, in this thread; control
                characters in the name are escaped.
            timeout: seconds for each attempt to log in, and without anything sent or received.
            deadline: seconds for all of it, the login included; None for no limit.
            ssh, **login: as for :meth:`run`.

        Returns:
            A :class:`TransferResult`: ``path``, ``files``, ``size`` in bytes, ``duration`` in
            seconds, and ``skipped``.

        Raises:
            TransferError: it did not arrive whole: a full disk, a lost connection; ``name``,
                ``done`` and ``total`` tell how far it came.
            SSHError: the login failed.
            FileNotFoundError: there is nothing at ``local``.

        Example:
            >>> client.upload(order, "train.py", "~/work/")
        """
        from clore_client.ssh.upload import check_upload, upload_connections, upload_path

        checked = check_upload(
            local, remote, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            streams=streams, progress=progress, timeout=timeout, deadline=deadline,
        )  # fmt: skip
        with self._connected(order, ssh, login, timeout, upload_connections(*checked)) as pool:
            return upload_path(pool, checked)

    def download(
        self,
        order: Mapping[str, Any],
        remote: PathArgument,
        local: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        streams: int | None = None,
        max_bytes: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a whole directory from the machine of an order. Needs paramiko.

        The other way round as :meth:`upload`, and on the same terms. Nothing that the machine
        says makes this write outside of ``local``. A file that grows meanwhile, as a log, arrives
        as it was at the start; any other change is an error.

        Parameters:
            order: a running order.
            remote: a path there; a relative one and ``~`` count from the home directory.
            local: a path here.
            max_bytes: refuse what is larger.
            preserve, verify, resume, symlinks, streams, progress, timeout, deadline, ssh,
                **login: as for :meth:`upload`.

        Returns:
            A :class:`TransferResult`.

        Raises:
            TransferError: it did not arrive whole, is larger than ``max_bytes``, or the machine
                sent what can't be right.
            SSHError: the login failed.

        Example:
            >>> client.download(order, "~/work/model.safetensors", ".", resume=True).size
            4976698672
        """
        from clore_client.ssh.download import DOWNLOAD_CONNECTIONS, DownloadOptions, download_path

        options = DownloadOptions(
            remote, local, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            streams=streams, max_bytes=max_bytes, progress=progress, timeout=timeout,
            deadline=deadline,
        )  # fmt: skip
        size = streams or DOWNLOAD_CONNECTIONS
        with self._connected(order, ssh, login, timeout, size, streams is not None) as pool:
            return download_path(pool, options)

    def scp(
        self,
        order: Mapping[str, Any],
        *,
        max_bytes: int | None = None,
        progress: Callable[..., object] | None = None,
        timeout: float = 30.0,
        **login: Any,
    ) -> Any:
        """Return a client of the package scp that a hostile host can't abuse.

        A transfer that fails may leave a partial file inside the target, and nothing elsewhere.

        Parameters:
            order: a running order.
            max_bytes: refuse to receive more in one ``get()``.
            progress: as for ``scp.SCPClient``.
            timeout: seconds for each attempt to log in, and of silence.
            **login: as for :meth:`run`.

        Returns:
            An ``scp.SCPClient`` with a connection of its own, which ``close()``, or the end of
            its block, closes.

        Raises:
            ImportError: paramiko or scp is not installed.

        Example:
            >>> with client.scp(order) as copy:
            ...     copy.put("train.py", "/root/train.py")
        """
        from clore_client.ssh.connect import check_login_options
        from clore_client.ssh.scp import guarded_scp

        connection = self._login(order, timeout=timeout, **check_login_options(login)).open()
        try:
            return guarded_scp(
                connection,
                socket_timeout=timeout,
                max_bytes=max_bytes,
                progress=progress,
                owns_ssh=True,
            )
        except BaseException:
            connection.close()
            raise

    # --- within ---

    def _login(
        self,
        order: Mapping[str, Any],
        *,
        password: str | None = None,
        key_path: PathArgument | None = None,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> Login:
        """Everything that is needed to log in, checked; nothing is sent."""
        from clore_client.ssh.connect import Login, plain_address
        from clore_client.ssh.host_keys import KeyCheck, check_host_key

        address = plain_address(order)
        check_number("timeout", timeout, above=True, unit="seconds")
        check_number("wait", wait, infinite=True, unit="seconds")
        mode = check_host_key("host_key", host_key)
        for name, value in (
            ("password", password), ("key_path", key_path), ("passphrase", passphrase),
        ):  # fmt: skip
            if value is not None and not (name == "key_path" and hasattr(value, "__fspath__")):
                check_text(name, value, secret=name != "key_path")
        if not password and not key_path:
            sent = self._credentials.get(self._order_number(order) or 0, {})
            password = order.get("ssh_password") or sent.get("ssh_password")
        keys = KeyCheck(
            self._pins, self._order_number(order), "{host}:{port}".format(**address), mode
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

    def _connected(
        self,
        order: Mapping[str, Any],
        ssh: paramiko.SSHClient | None,
        login: dict[str, Any],
        timeout: float = 30.0,
        size: int = 1,
        eager: bool = True,
    ) -> ConnectionPool:
        from clore_client.ssh.connect import ConnectionPool, check_connection, check_login_options

        options = check_login_options(login)
        if ssh is not None:
            return ConnectionPool(None, check_connection(ssh))
        return ConnectionPool(self._login(order, timeout=timeout, **options), None, size, eager)

    @staticmethod
    def _order_number(order: Mapping[str, Any]) -> int | None:
        return Order(order).id

    def _alias(self, order: Mapping[str, Any]) -> str:
        from clore_client.ssh.connect import parse_ssh_command

        if not isinstance(order, Mapping):
            raise TypeError(f"order must be one as wait_for_order() returns it, not {order!r}")
        address = parse_ssh_command(order)
        return self._pins.alias(self._order_number(order), "{host}:{port}".format(**address))
