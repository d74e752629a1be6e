"""Send prepared responses: the file ``wallets`` of a folder for ``/v1/wallets``.

It costs almost no time, and the same for both sides of a comparison.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
from pathlib import Path

from clore_client.simulator.tls import make_context


def prepared(folder: Path) -> dict[bytes, bytes]:
    """Path of a request -> its whole response."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: "
    answers = {}
    for file in folder.iterdir():
        body = file.read_bytes()
        answers[f"/v1/{file.name}".encode()] = head + b"%d\r\n\r\n" % len(body) + body
    return answers


def serve(sock: socket.socket, tls: ssl.SSLContext | None, answers: dict[bytes, bytes]) -> None:
    """Respond to the requests of one connection."""
    # Otherwise a delayed ACK between two small writes would add 40 ms to each call.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        with tls.wrap_socket(sock, server_side=True) if tls else sock as connection:
            request = b""
            while data := connection.recv(65536):
                request += data
                if request.endswith(b"\r\n\r\n"):  # a GET has no body
                    connection.sendall(answers[request.split(b" ", 2)[1]])
                    request = b""
    except OSError:
        pass  # the client went away


def listen(folder: Path, tls: ssl.SSLContext | None) -> int:
    """Serve in a thread without end, and return the port."""
    answers = prepared(folder)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock, tls, answers), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def main() -> None:
    """Serve with and without TLS until the input ends."""
    folder, secrets = Path(sys.argv[1]), Path(sys.argv[2])
    context, ca_file = make_context(secrets)
    ports = {"http": listen(folder, None), "https": listen(folder, context)}
    urls = {scheme: f"{scheme}://127.0.0.1:{port}" for scheme, port in ports.items()}
    print(json.dumps({**urls, "ca": str(ca_file)}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
