"""What runs on the machine for a transfer: one script for any POSIX shell, and its answers.

A path goes as an argument in plain ASCII, whatever its bytes; lists of names go over standard
input. The first line that the script prints tells its output from what a shell's start-up files
may have printed before. Nothing in the output is trusted: lengths are bounded, numbers parsed.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transport import NoChannelError, open_session, request_exec

MARK = "clore-transfer-1"
BLOCK = 65536  # bytes; ranges begin at multiples of it
MOST_NOISE = 65536  # bytes before the mark
MOST_LINE = 65536
WINDOW = 32 * 1024 * 1024  # bytes under way to us on one channel: 320 MB/s at 100 ms
LAST_PATIENCE = 3.0  # seconds for each step of tidying up, after an error or Ctrl-C
CHANNEL_PAUSE = 0.05  # seconds; a channel that was closed is freed a little later
MOST_LEVELS = 256  # directories within one another; Python removes no tree that is much deeper
PACKET = 131072  # bytes; a fourth of the packets that 32 KB would make

SCRIPT = r"""
export LC_ALL=C
unset CDPATH
u() { t=$1; case $t in *\\*) t=$(printf %b "${t}x"); t=${t%x};; esac; }
fail() { printf "no %s\n" "$*"; exit 1; }
# What is not to be resumed goes with whoever fails last: also after the connection broke.
drop() { [ "$keep" = 1 ] || rm -rf "$j" "$j.done"; fail "$*"; }
need() { command -v "$1" >/dev/null 2>&1 || fail "the machine has no $1"; }
# openssl is up to six times as fast as sha256sum.
hash() {
  if command -v openssl >/dev/null 2>&1; then openssl dgst -sha256 -r
  else need sha256sum; sha256sum; fi
}
sum() { dd if="$1" bs=65536 skip="$2" count="$3" 2>/dev/null | head -c "$4" | hash; }
ours() { dd if="$1" bs=65536 skip="$2" count="$3" 2>/dev/null | hash; }
# $1: where to, $2: the name of what is sent, $3: f or d, $4: of the temporary. -> f, p
target() {
  u "$2"; n=$t; u "$1"; f=$t
  if [ -d "$f" ]; then f=${f%/}/$n
  else case $f in */) fail "there is no directory $f";; esac; fi
  case $f in */*) d=${f%/*};; *) d=.;; esac
  [ -d "${d:-/}" ] || fail "there is no directory ${d:-/}"
  if [ "$3" = f ]; then [ ! -d "$f" ] || fail "$f is a directory"
  else [ ! -e "$f" ] || [ -d "$f" ] || fail "$f is no directory"; fi
  p=$d/.clore-part-$4
}
verb=$1; shift
printf "%s\n" clore-transfer-1
case $verb in
look)
  u "$1"
  if [ -d "$t" ]; then
    printf "d\n"; cd "$t" || exit 1
    exec find . -exec stat -c "%f %s %Y %n" {} +
  elif [ -f "$t" ]; then
    s=$(stat -L -c "%s %Y %a" "$t") || exit 1
    printf "f %s\n" "$s"
    n=${s%% *}
    [ "$n" -gt "$2" ] || head -c "$n" "$t" || exit 1
    if [ "$n" -le "$2" ]; then
      if [ "$3" = 1 ]; then head -c "$n" "$t" | hash; fi
      stat -L -c "%s %Y %a" "$t"
    fi
  elif [ -e "$t" ]; then printf "o\n"
  else printf "n\n"; fi;;
get)
  u "$1"; dd if="$t" bs=65536 skip="$2" count="$3" 2>/dev/null | head -c "$4"
  sum "$t" "$2" "$3" "$4";;
rangesum) u "$1"; sum "$t" "$2" "$3" "$4";;
many) u "$1"; cd "$t" && exec xargs -0 cat --;;
sums) need sha256sum; u "$1"; cd "$t" && exec xargs -0 sha256sum --;;
sizes) target "$1" "$2" "$3" "$4"; cd "$p" && exec xargs -0 stat -c %s --;;
putsums) need sha256sum; target "$1" "$2" "$3" "$4"; cd "$p" && exec xargs -0 sha256sum --;;
begin) target "$1" "$2" "$3" "$4"; printf "ok\n"
  if [ -s "$p.done" ]; then cat "$p.done"; else rm -rf "$p"; fi;;
wipe) fail() { printf "ok\n"; exit 0; } # then there is nothing to be wiped
  target "$1" "$2" "$3" "$4"; rm -rf "$p" "$p.done" && printf "ok\n";;
put) # ... $5: name within, $6: block, $7: blocks, $8: bytes, $9: of the job, ${10}: whether to
  # hash, ${11}: whether to keep what has arrived
  target "$1" "$2" "$3" "$4"; u "$5"; j=$p; keep=${11}
  if [ "$3" = d ]; then p=$p/$t; mkdir -p "${p%/*}" || exit 1; fi
  e=$(dd of="$p" bs=65536 seek="$6" conv=notrunc 2>&1) || drop "$e"
  e=${e##*
}
  [ "${e%% *}" = "$8" ] || drop "only ${e%% *} of $8 bytes arrived"
  h=-
  if [ "${10}" = 1 ]; then h=$(ours "$p" "$6" "$7"); fi
  printf "%s\n" "$9" >>"$j.done" && printf "ok %s\n" "${h%% *}";;
putsum) target "$1" "$2" "$3" "$4"; u "$5"; [ "$3" = f ] || p=$p/$t
  ours "$p" "$6" "$7";;
untar) # ... $5: m for times of now, p for modes as sent, $6: of the job, $7: whether to keep
  # what has arrived
  target "$1" "$2" "$3" "$4"; need tar; j=$p; keep=$7
  mkdir -p "$p" || exit 1
  e=$(cd "$p" && tar "-xo${5}f" - 2>&1) || drop "$e"
  printf "%s\n" "$6" >>"$p.done" && printf "ok\n";;
meta) # ... $5: name within, $6: mode, $7: time or -
  target "$1" "$2" "$3" "$4"; u "$5"; [ "$3" = f ] || p=$p/$t
  chmod "$6" "$p" || exit 1
  if [ "$7" != - ]; then touch -d "@$7" "$p" || exit 1; fi
  printf "ok\n";;
finish) # ... $5: bytes, $6: mode, $7: time or -; begins when it is told to
  read -r x; [ "$x" = go ] || exit 1
  target "$1" "$2" "$3" "$4"
  if [ "$3" = f ]; then
    s=$(stat -c %s "$p") || exit 1
    [ "$s" = "$5" ] || fail "$s of $5 bytes arrived"
    chmod "$6" "$p" || exit 1
    if [ "$7" != - ]; then touch -d "@$7" "$p" || exit 1; fi
    mv -f "$p" "$f" || exit 1
  elif [ ! -e "$f" ]; then mv "$p" "$f" || exit 1
  else
    cd "$p" || exit 1
    case $f in /*) o=$f;; *) o=$OLDPWD/$f;; esac
    # What is new there goes as a whole, with its modes and times.
    find . -type d -exec sh -c "[ ! -e \"\$0/\$1\" ] && mv \"\$1\" \"\$0/\$1\"" "$o" {} \; -prune
    find . -type d -exec sh -c "for d; do mkdir -p \"\$0/\$d\" || exit 1; done" "$o" {} + || exit 1
    find . -type f -exec sh -c "for g; do mv -f \"\$g\" \"\$0/\$g\" || exit 1; done" "$o" {} + \
      || exit 1
    cd "$OLDPWD" && rm -rf "$p"
  fi
  rm -f "$p.done"
  printf "ok %s\n" "$f";;
esac
"""


def far_path(path: bytes) -> bytes:
    """A remote path as the script wants it: relative ones and ``~`` count from the home."""
    if path == b"~" or path.startswith(b"~/"):
        path = path[1:].lstrip(b"/") or b"."
    elif path.startswith(b"~"):
        raise ValueError(
            f"remote: of homes, only one's own is known (~/), not {printable(repr(path), 80)}"
        )
    return path if path.startswith(b"/") else b"./" + path


def far_command(verb: str, *arguments: bytes | str | int) -> str:
    """The line that runs a verb of the script."""
    words = " ".join(f"'{_escaped(a)}'" for a in arguments)
    return f"exec sh -c '{SCRIPT}' clore {verb} {words}"


def _escaped(argument: bytes | str | int) -> str:
    raw = argument if isinstance(argument, bytes) else str(argument).encode("ascii")
    if isinstance(argument, (str, int)):
        return raw.decode("ascii")
    return "".join(
        chr(b) if chr(b).isascii() and (chr(b).isalnum() or b in b"/._-") else f"\\0{b:03o}"
        for b in raw
    )


class Watch:
    """Ends a connection that takes nothing any more, for as long as a block lasts.

    paramiko writes to a socket with no limit of time, whatever the channel's timeout is.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.bitten: set[Any] = set()
        self._busy: dict[int, tuple[float, Any]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="clore-transfer", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def over(self, transport: Any) -> Iterator[None]:
        """Something that writes to the machine, and by itself ends within the timeout."""
        lane = threading.get_ident()
        self._busy[lane] = (time.monotonic(), transport)
        try:
            yield
        finally:
            self._busy.pop(lane, None)

    def hurry(self) -> None:
        """It has failed: what is still to be done is not waited for as long."""
        self.timeout = min(self.timeout, LAST_PATIENCE)

    def _look(self) -> None:
        while not self._over.wait(min(self.timeout, LAST_PATIENCE) / 4):
            late = time.monotonic() - 1.25 * self.timeout - 0.25
            for since, transport in list(self._busy.values()):
                if since < late:
                    self.bitten.add(transport)
                    transport.close()


class Exec:
    """One verb that runs on the machine: what is sent to it, and what it answers."""

    def __init__(self, ssh: Any, command: str, watch: Watch, patience: float = 0.0) -> None:
        """``patience``: seconds for which a machine without a free channel is asked again."""
        self._timeout = timeout = watch.timeout
        self._watch = watch
        transport = ssh.get_transport()
        if transport is None:
            raise SSHError("the connection is closed")
        deadline = time.monotonic() + patience
        while True:
            try:
                with watch.over(transport):
                    self.channel = open_exec(transport, command, timeout, WINDOW, PACKET)
                break
            except NoChannelError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(CHANNEL_PAUSE)
        self._buffer = b""
        self._begun = False

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError), self._writing():
            self.channel.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return self._watch.over(self.channel.get_transport())

    def __enter__(self) -> Exec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- there ---

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of it; False when the other side takes no more: its answer says why."""
        view = memoryview(data)
        try:
            while view:
                with self._writing():
                    view = view[self.channel.send(view[:BLOCK]) :]
        except (OSError, EOFError) as error:
            bitten = self.channel.get_transport() in self._watch.bitten
            if bitten or isinstance(error, TimeoutError):
                raise SSHError(f"the machine took nothing for {self._timeout:g}s") from None
            return False
        return True

    def end(self) -> None:
        """There is no more to be sent."""
        with contextlib.suppress(OSError, EOFError), self._writing():
            self.channel.shutdown_write()

    # --- and back ---

    def receive(self, most: int) -> bytes:
        """Some of what the verb printed, at most ``most`` bytes; empty at its end."""
        if not self._begun:
            self._begin()
        return self._more(most)

    def line(self) -> bytes:
        """The next line, without its end; the rest where there is none."""
        kept = b""
        while b"\n" not in kept:
            piece = self.receive(MOST_LINE)
            kept += piece
            if not piece:
                break
            if len(kept) > MOST_LINE:
                raise SSHError("the machine answers with an endless line")
        line, _, self._buffer = kept.partition(b"\n")
        return line

    def rest(self, most: int) -> bytes:
        """All that is left; an error for more than ``most`` bytes."""
        pieces, size = [], 0
        while piece := self.receive(BLOCK):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise SSHError(f"the machine answers with more than {most} bytes")
        return b"".join(pieces)

    def status(self) -> int:
        """The exit status; -1 where none came."""
        if not self.channel.status_event.wait(self._timeout):
            raise SSHError(f"the machine said nothing for {self._timeout:g}s")
        return int(self.channel.exit_status)

    def answer(self) -> str:
        """What follows ``ok``; an error for anything else."""
        text = self.rest(MOST_LINE).decode("utf-8", "surrogateescape")
        word, _, more = text.partition("\n")[0].partition(" ")
        if word == "ok" and text.endswith("\n"):
            return text[3:-1]
        raise self.refused(more if word == "no" else text, text[3:] if word == "no" else "")

    def refused(self, *said: str) -> SSHError:
        """An error with what the machine says of it."""
        said = (*said, self.errors())
        transport = self.channel.get_transport()
        if not any(s.strip() for s in said) and not transport.is_active():
            return SSHError("the connection broke")
        text = next((s.strip() for s in said if s.strip()), "it does not say why")
        return SSHError(f"the machine refuses: {printable(text, 500)}")

    def errors(self) -> str:
        """What has come on the other stream."""
        text = b""
        deadline = time.monotonic() + 1.0
        while self.channel.recv_stderr_ready() and len(text) < MOST_LINE:
            with self._writing():
                text += self.channel.recv_stderr(MOST_LINE)
            if time.monotonic() > deadline:
                break
        return text.decode("utf-8", "replace")

    def _more(self, most: int) -> bytes:
        if self._buffer:
            piece, self._buffer = self._buffer[:most], self._buffer[most:]
            return piece
        try:
            with self._writing():  # the window is widened
                return self.channel.recv(most)  # type: ignore[no-any-return]
        except TimeoutError:
            raise SSHError(f"the machine sent nothing for {self._timeout:g}s") from None

    def _begin(self) -> None:
        """Skip what comes before the mark."""
        self._begun = True
        wanted, seen = MARK.encode() + b"\n", b""
        deadline = time.monotonic() + self._timeout
        while wanted not in seen:
            piece = self._more(BLOCK)
            seen += piece
            if not piece or len(seen) > MOST_NOISE or time.monotonic() > deadline:
                errors = self.errors()
                if not seen and not errors and not self.channel.get_transport().is_active():
                    raise SSHError("the connection broke")
                said = errors.strip() or seen.decode("utf-8", "replace").strip() or "nothing"
                raise SSHError(
                    f"the machine runs no shell as it should, and says: {printable(said, 300)}"
                )
        self._buffer = seen.partition(wanted)[2] + self._buffer


def open_exec(transport: Any, command: str, timeout: float, window: int, packet: int) -> Any:
    """Open a channel and ask for a command on it."""
    channel = open_session(transport, timeout, window)
    request_exec(channel, command)
    return channel


def parse_listing(text: bytes, most: int, take: Callable[[int, int, int, bytes], None]) -> None:
    """Read what ``find -exec stat`` printed: mode, size, time and name of each entry."""
    # A name may hold a newline: an entry begins where mode, size, time and "./" stand.
    pattern = rb"([0-9a-f]{1,8}) ([0-9]{1,18}) (-?[0-9]{1,19}) (\.(?:/.*?)?)\n"
    entry = re.compile(pattern + rb"(?=[0-9a-f]{1,8} [0-9]{1,18} -?[0-9]{1,19} \./|\Z)", re.S)
    at = count = 0
    while at < len(text):
        found = entry.match(text, at)
        count += 1
        if found is None or count > most:
            raise SSHError(
                f"the machine lists what can't be read: {printable(repr(text[at : at + 80]), 120)}"
                if found is None
                else f"the machine lists more than {most} files"
            )
        mode, size, mtime, name = found.groups()
        take(int(mode, 16), int(size), int(mtime), name[2:])
        at = found.end()


def checked_name(name: bytes) -> str:
    """A name below a directory, from the machine, as it may be used here."""
    parts = name.split(b"/")
    if not name or b"\0" in name or any(part in (b"", b".", b"..") for part in parts):
        raise SSHError(f"the machine names a file that can't be one: {printable(repr(name), 120)}")
    if len(parts) > MOST_LEVELS:
        raise SSHError(f"the machine names a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and re.search(r'[\\:*?"<>|]', text):
        raise SSHError(f"a name that this system does not know: {printable(repr(name), 120)}")
    return text
