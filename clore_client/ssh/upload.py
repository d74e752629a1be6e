"""Copy files and directories to a host: under a temporary name, renamed when complete."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.remote import (
    BLOCK,
    CHECK_TOOLS,
    LAST_PATIENCE,
    MAX_LINE,
    NoShellError,
    RemoteScript,
    parse_digests,
    parse_listing,
    remote_path,
    remote_script,
    sh_quoted,
)
from clore_client.ssh.sftp import SftpUpload
from clore_client.ssh.transfer import (
    LAST_TIME,
    MAX_ANSWER,
    TRANSFER_PIECE,
    FileEntry,
    Transfer,
    TransferOptions,
    about,
    changed_files,
    chunk_size,
    facts_key,
    file_digest,
    links_within,
)
from clore_client.ssh.transport import NoChannelError, connection_errors

# sshd takes 2 MB on a channel before it wants to be asked again, and ten channels on a connection:
# over a distance it is the number of channels that makes an upload fast.
UPLOAD_CHANNELS = 8
RESUMABLE_CHANNELS = 2  # fewer chunks are on their way when the connection breaks
# From how many bytes on how many connections pay for their logins, which go on at the same time.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))
SMALL_FILE = 4 * 1024 * 1024  # bytes; smaller ones of a directory travel together
BUNDLE_BYTES = 8 * 1024 * 1024
BUNDLE_FILES = 1000
TAR_BLOCK = 512  # bytes
META_LINES = 500

# Where it goes: $f is the target, $p the temporary name beside it.
TARGET = r"""
if [ -d "$f" ]; then f=${f%/}/$name
else case $f in */) no "there is no directory $f";; esac; fi
if [ -h "$f" ] && [ ! -d "$f" ]; then
  [ "$follow" = 1 ] || no "$f is a symlink: remove it, or pass symlinks='follow'"
  f=$(readlink -f "$f") || no "$f is a symlink to nowhere"
fi
case $f in /*) ;; *) f=$PWD/${f#./};; esac
d=${f%/*}; d=${d:-/}
[ -d "$d" ] || no "there is no directory $d"
if [ "$kind" = f ]; then
  [ ! -d "$f" ] || no "$f is a directory"
  [ ! -e "$f" ] || [ -f "$f" ] || no "$f is neither a file nor a directory"
else [ ! -e "$f" ] || [ -d "$f" ] || no "$f is no directory"; fi
p=${d%/}/.clore-part-$token
r=$p.done
"""
# The script that lasts as long as the upload: it makes the temporary name, and renames it at the
# end. Whatever ends it before removes that name, unless the upload is to be resumed.
CONTROL = (
    CHECK_TOOLS
    + TARGET
    + r"""
u=$(umask); umask 077
make() { if [ "$kind" = f ]; then : >>"$p"; else mkdir -p "$p"; fi; }
wipe() { rm -rf "$p" "$r" || { sleep 1; rm -rf "$p" "$r"; }; }
gone() { [ "$keep" = 1 ] || wipe; exit 1; }
trap gone HUP TERM
[ "$keep" = 1 ] && [ -s "$r" ] && [ -e "$p" ] || wipe
make || no "$d: nothing can be made there"
no() { [ "$keep" = 1 ] || wipe; printf "no %s%s" "$*" "$n"; exit 1; }
printf "ready %s\n" "$u"
[ ! -s "$r" ] || cat "$r"
echo "$token"
finish_file() {
  s=$(stat -c %s "$p"); [ "$s" = "$size" ] || no "$s of $size bytes arrived"
  m=$(printf %o $((0$mode & ~0$u)))
  [ ! -e "$f" ] || m=$(stat -c %a "$f")
  [ "$preserve" = 0 ] || m=$mode
  chmod "$m" "$p" || exit 1
  [ "$preserve" = 0 ] || TZ=UTC0 touch -t "$time" "$p" || exit 1
  mv -f "$p" "$f" || exit 1
}
finish_tree() {
  if [ ! -e "$f" ]; then mv "$p" "$f" || exit 1; return; fi
  cd "$p" || exit 1
  # What is new there goes as a whole, with its modes and times.
  find . -type d -exec sh -c '[ ! -e "$0/$1" ] && mv "$1" "$0/$1"' "$f" {} \; -prune
  find . ! -type d -exec sh -c 'for g; do
    [ $1 = 1 ] || [ ! -f "$0/$g" ] || [ ! -f "$g" ] || chmod "$(stat -c %a "$0/$g")" "$g"
    mv -f "$g" "$0/$g" || exit 1; done' "$f" {} + || exit 1
  cd / && rm -rf "$p"
}
while read -r word || gone; do case $word in
restart) wipe; make;;
wipe) wipe; exit 1;;
list) (cd "$p" && list); echo "$token";;
go) if [ "$kind" = f ]; then finish_file; else finish_tree; fi
  rm -f "$r"; printf "ok %s\n" "$f"; exit 0;;
*) gone;;
esac; done
"""
)
# The others start along with it, and wait for the name that it makes.
WAIT = (
    TARGET
    + r"""
w=0; until [ -e "$p" ]; do
  w=$((w+1)); [ $w -lt 500 ] || no "it was not begun"
  sleep 0.02 2>/dev/null || sleep 1
done
umask 077
"""
)
# Reads chunks of one file, each with a line before it (block, size, key) and one after it.
PUT = (
    WAIT
    + r"""
if [ "$kind" = d ]; then p=$p/$inner; mkdir -p "${p%/*}" && : >>"$p" || exit 1; fi
c=notrunc,sparse
put() { dd of="$p" ibs="$s" count=1 obs=$block seek="$k" iflag=fullblock conv=$c 2>&1; }
while read -r k s key && [ -e "$p" ]; do
  # Not every dd leaves holes; one that does not know the word has read nothing yet.
  e=$(put) || { case $e in *sparse*) c=notrunc; e=$(put);; *) false;; esac; } || no "${e%%$n*}"
  read -r t && [ "$t" = . ] || exit 1
  h=-; [ "$hash" = 0 ] || h=$(part "$p" "$k" "$s" | $sha)
  [ "$keep" = 0 ] || echo "$key" >>"$r"
  echo "done ${h%% *}"
done
echo end
"""
)
# Reads tar archives, with the same lines around each.
UNTAR = (
    WAIT
    + r"""
cd "$p" || exit 1
while read -r s key; do
  e=$(dd ibs="$s" count=1 obs=$block iflag=fullblock 2>/dev/null | tar -x"$how"f - 2>&1) ||
    no "${e%%$n*}"
  read -r t && [ "$t" = . ] || exit 1
  [ "$keep" = 0 ] || echo "$key" >>"$r"
  echo "done -"
done
echo end
"""
)
# Prints digests of chunks, each asked for by a line (block, size), or of files.
CHUNK_DIGESTS = r"""while read -r k s; do part "$path" "$k" "$s" | $sha; done"""
FILE_DIGESTS = r"""cd "$path" && xargs -0 $sha"""


class LocalTree:
    """What is to be sent: files, directories, symlinks, and what is left out."""

    def __init__(self, path: bytes, symlinks: str) -> None:
        self.path = path
        self.symlinks = symlinks
        self.entries: list[FileEntry] = []
        self.left_out: list[tuple[bytes, str]] = []
        try:
            facts = os.stat(path)  # the one that is named may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.is_folder = stat.S_ISDIR(facts.st_mode)
        if self.is_folder:
            self._scan(b"", (os.path.realpath(path),))
        elif stat.S_ISREG(facts.st_mode):
            self._add(b"", facts)
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    def place(self, entry: FileEntry) -> str:
        """Return where an entry is here."""
        return os.fsdecode(os.path.join(self.path, entry.name) if entry.name else self.path)

    def pieces(self, entry: FileEntry, start: int, length: int) -> Iterator[memoryview]:
        """Read a part of a file, which must stay as it was when it was looked at.

        What was yielded is overwritten by the next piece.
        """
        buffer = memoryview(bytearray(min(TRANSFER_PIECE, max(length, 1))))
        with open(self.place(entry), "rb", buffering=0) as file:
            file.seek(start)
            while length and (size := file.readinto(buffer[:length])):
                length -= size
                yield buffer[:size]
            facts = os.fstat(file.fileno())
            if length or (facts.st_size, facts.st_mtime_ns) != (entry.size, entry.mtime):
                raise SSHError("it was changed meanwhile")

    def _scan(self, folder: bytes, above: tuple[bytes, ...]) -> None:
        with os.scandir(os.path.join(self.path, folder) if folder else self.path) as found:
            entries = sorted(found, key=lambda e: e.name)
        for entry in entries:
            name = os.path.join(folder, entry.name) if folder else entry.name
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(facts.st_mode):
                self._take_link(name, entry.path, facts, above)
            elif stat.S_ISDIR(facts.st_mode):
                self._add(name, facts)
                self._scan(name, (*above, os.path.realpath(entry.path)))
            elif stat.S_ISREG(facts.st_mode):
                self._add(name, facts)
            else:
                self.left_out.append((name, "it is no file"))

    def _take_link(
        self, name: bytes, path: bytes, facts: os.stat_result, above: tuple[bytes, ...]
    ) -> None:
        link, real = os.readlink(path), os.path.realpath(path)
        within = real.startswith(above[0].rstrip(b"/") + b"/") and os.path.exists(real)
        if self.symlinks == "copy" and within and links_within(name, link) is not None:
            self.entries.append(FileEntry(name, 0, facts.st_mtime_ns, 0o777, "l", link))
        elif self.symlinks == "follow" and within and os.path.isfile(real):
            self._add(name, os.stat(real))
        elif self.symlinks == "follow" and within and os.path.isdir(real) and real not in above:
            self._add(name, os.stat(real))
            self._scan(name, (*above, real))
        else:
            self.left_out.append((name, f"a symlink to {os.fsdecode(link)}"))

    def _add(self, name: bytes, facts: os.stat_result) -> None:
        if os.sep != "/":
            name = name.replace(os.fsencode(os.sep), b"/")
        kind = "d" if stat.S_ISDIR(facts.st_mode) else "f"
        mode = facts.st_mode & 0o777
        self.entries.append(FileEntry(name, facts.st_size, facts.st_mtime_ns, mode, kind))


class Source:
    """Portions of what is to be sent, each with the key of its record, for several workers.

    Attributes:
        keys: of all of it.
        earlier: what an earlier upload has sent.
        left: what no worker has taken yet, the first one last.
    """

    def __init__(self, portions: list[tuple[str, Any]], done: set[str]) -> None:
        self.keys = {key for key, _ in portions}
        self.earlier = [portion for key, portion in portions if key in done]
        self.left = [portion for portion in portions if portion[0] not in done][::-1]

    def take(self) -> tuple[str, Any] | None:
        try:
            return self.left.pop()
        except IndexError:
            return None

    def rest(self, first: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the first, and then whatever is left."""
        portion: tuple[str, Any] | None = first
        while portion is not None:
            yield portion
            portion = self.take()


class Chunks(Source):
    """The chunks of one file: (start, size).

    Attributes:
        unconfirmed: how many of them a worker sends ahead; few where a cut is to cost little.
    """

    def __init__(self, entry: FileEntry, resume: bool, done: set[str]) -> None:
        self.entry = entry
        step = chunk_size(entry.size, resume)
        self.unconfirmed = max(2, entry.size // (200 * step)) if resume else entry.size
        chunks = [(start, min(step, entry.size - start)) for start in range(0, entry.size, step)]
        super().__init__([(facts_key((*entry.facts, step, c)), c) for c in chunks], done)


class Bundles(Source):
    """Small files, directories and symlinks, in lists that travel together."""

    def __init__(self, entries: list[FileEntry], resume: bool, done: set[str]) -> None:
        most = chunk_size(sum(e.size for e in entries), True) if resume else BUNDLE_BYTES
        self.every: list[list[FileEntry]] = []
        size = most
        for entry in entries:
            if size >= most or len(self.every[-1]) >= BUNDLE_FILES:
                self.every.append([])
                size = 0
            self.every[-1].append(entry)
            size += entry.size
        # The time of a directory changes with every file that is made in it.
        facts = [[e.facts if e.kind == "f" else (e.name, e.link) for e in b] for b in self.every]
        keys = [facts_key(what) for what in facts]
        super().__init__(list(zip(keys, self.every, strict=True)), done)


def check_upload(local: Any, remote: Any, **given: Any) -> tuple[TransferOptions, LocalTree]:
    """Check the arguments of an upload, and see what is to be sent; nothing is sent yet."""
    options = TransferOptions(local, remote, **given)
    remote_path(options.remote)
    return options, LocalTree(os.path.expanduser(options.local), options.symlinks)


def upload_connections(options: TransferOptions, tree: LocalTree) -> int:
    """Return how many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = sum(entry.size for entry in tree.entries)
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)


def upload_path(pool: ConnectionPool, checked: tuple[TransferOptions, LocalTree]) -> TransferResult:
    """Upload; see ``CloreClient.upload``."""
    options, tree = checked
    name = os.path.basename(os.path.abspath(tree.path))
    transfer = Transfer(pool, options, os.fsdecode(name) or "/")
    for left_out, why in tree.left_out:
        transfer.leave_out(left_out, why)
    try:
        with transfer.watched():
            path = _sent(transfer, tree)
    except BaseException as error:
        failure = transfer.failed(error, tree.files)
        if failure is error:
            raise
        raise failure from error
    return transfer.result(path, tree.files)


def _sent(transfer: Transfer, tree: LocalTree) -> bytes:
    """Upload by the host's shell, or else over SFTP; the path of what has been made."""
    careful = False
    while True:
        try:
            return Upload(transfer, tree, careful).run()
        except NoShellError as error:
            transfer.restart()
            reason_why: Exception = error
        except NoChannelError as error:
            transfer.restart()
            if not careful:
                careful = True  # once more, with fewer channels
                continue
            reason_why = error
        logger.warning("files go over SFTP, which is slower: %s", reason_why)
        return SftpUpload(transfer, tree).run()


class Upload:
    """One upload by a shell of the host, from the first question to the rename.

    Parameters:
        careful: start the workers last, so that they leave a channel for what oversees them.
    """

    def __init__(self, transfer: Transfer, tree: LocalTree, careful: bool = False) -> None:
        self._transfer = transfer
        self._careful = careful or tree.is_folder or transfer.options.resume or transfer.takes_turns
        self._options = options = transfer.options
        self._tree = tree
        whole = os.path.abspath(tree.path)
        kind = "d" if tree.is_folder else "f"
        # A name that the next try finds again, or one of nobody else's.
        same = facts_key((kind, whole, options.remote))[:20]
        self._values: dict[str, Any] = {
            "f": remote_path(options.remote),
            "name": os.path.basename(whole) or b".",
            "kind": kind,
            "token": same if options.resume else os.urandom(10).hex(),
            "keep": int(options.resume),
            "follow": int(options.symlinks == "follow"),
        }
        self._control: RemoteScript | None = None
        self._files: list[Chunks] = []
        self._bundles = Bundles([], False, set())

    def run(self) -> bytes:
        """Upload; the path of what has been made."""
        transfer = self._transfer
        try:
            # What needs no answer of the host starts without it: that saves a round trip.
            if not self._careful:
                self._plan(set())
                self._start()
            self._control = transfer.script(
                transfer.pool.ssh, self._control_script(), patient=self._careful
            )
            umask, done = self._ready(self._control)
            if self._careful:
                self._prepare(umask, done)
                self._start()
            transfer.finish_workers()
            self._check_sent()
            if self._tree.is_folder:
                self._check_tree(self._control)
                self._set_modes()
            self._control.send(b"go\n")
            path = self._control.answer(b"ok")
            self._control.finish()
            return path
        except BaseException:
            transfer.stop(but=self._control)
            transfer.join_workers()
            self._tidy()
            raise
        finally:
            transfer.join_workers()
            if self._control is not None:
                self._control.close()

    @property
    def _sources(self) -> list[Source]:
        return [self._bundles, *self._files]

    def _control_script(self) -> bytes:
        values = dict(self._values, preserve=int(self._options.preserve))
        if not self._tree.is_folder:
            (entry,) = self._tree.files
            values.update(size=entry.size, mode=f"{entry.mode:o}", time=touch_time(entry.mtime))
        return remote_script("upload", CONTROL, **values)

    def _tidy(self) -> None:
        """Let the host remove what it has, and wait until it has."""
        if self._control is None:
            return
        self._control.end()
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        try:
            with self._transfer.watchdog.limit(LAST_PATIENCE, self._control.close):
                self._control.rest(MAX_LINE)
        except failures as error:
            if not self._options.resume:
                logger.warning("a temporary file may stay on the machine: %s", error)

    def _ready(self, control: RemoteScript) -> tuple[int, set[str]]:
        """Wait for the host; its umask, and what an earlier upload has sent."""
        umask = control.answer(b"ready")
        if not re.fullmatch(rb"[0-7]{1,5}", umask):
            raise control.refused(b"ready " + umask)
        lines = control.until(self._values["token"].encode(), MAX_ANSWER)
        return int(umask, 8), set(lines.decode("ascii", "replace").split())

    def _prepare(self, umask: int, done: set[str]) -> None:
        if not self._options.preserve and self._tree.is_folder:
            for entry in self._tree.entries:
                entry.mode &= ~umask
        self._plan(done)
        keys = {key for source in self._sources for key in source.keys}
        if not done <= keys and self._control is not None:  # of another source, or an older one
            self._control.send(b"restart\n")
            self._plan(set())

    def _plan(self, done: set[str]) -> None:
        resume, tree = self._options.resume, self._tree
        large = [e for e in tree.files if not tree.is_folder or e.size >= SMALL_FILE]
        small = [e for e in tree.entries if tree.is_folder and e not in large]
        self._files = [Chunks(entry, resume, done) for entry in large]
        self._bundles = Bundles(small, resume, done)

    def _start(self) -> None:
        transfer, options = self._transfer, self._options
        count = sum(len(source.left) for source in self._sources)
        channels = RESUMABLE_CHANNELS if options.resume else UPLOAD_CHANNELS
        if transfer.near:
            channels = 1
        connections = upload_connections(options, self._tree)
        if (transfer.near and options.streams is None) or options.resume:
            connections = 1
        workers = min(count, connections * channels)
        # What comes in several pieces at once is read back there, and compared.
        self._hashes = options.verify or options.resume or workers > 1
        transfer.start_workers(connections, workers, self._work)

    def _work(self, ssh: Any) -> None:
        """Send what is left, until nothing is."""
        for source in self._sources:
            while (portion := source.take()) is not None:
                try:
                    if isinstance(source, Chunks):
                        self._send_chunks(ssh, source, portion)
                    else:
                        self._send_bundles(ssh, source, portion)
                except NoChannelError:
                    source.left.append(portion)
                    raise

    def _send_chunks(self, ssh: Any, source: Chunks, first: tuple[str, Any]) -> None:
        entry = source.entry
        script = remote_script("put", PUT, **self._values, inner=entry.name, hash=int(self._hashes))
        with about(entry), self._transfer.script(ssh, script) as put:
            sent: list[str] = []  # digests of what the host has not confirmed yet
            for key, (start, size) in source.rest(first):
                if len(sent) >= source.unconfirmed:
                    self._confirm(put, sent.pop(0))
                digest = hashlib.sha256()
                put.send(b"%d %d %s\n" % (start // BLOCK, size, key.encode()))
                for piece in self._tree.pieces(entry, start, size):
                    if self._hashes:
                        digest.update(piece)
                    if not put.send(piece):
                        break  # the answer says why it takes no more
                    self._transfer.moved(entry, len(piece))
                sent.append(digest.hexdigest())
                if not put.send(b".\n"):
                    break
            put.end()
            for expected in sent:
                self._confirm(put, expected)
            put.answer(b"end")

    def _confirm(self, put: RemoteScript, digest: str) -> None:
        if put.answer(b"done") != (digest.encode() if self._hashes else b"-"):
            raise SSHError("SHA-256 differs")

    def _send_bundles(self, ssh: Any, source: Source, first: tuple[str, Any]) -> None:
        how = "op" if self._options.preserve else "opm"
        script = remote_script("untar", UNTAR, **self._values, how=how)
        with self._transfer.script(ssh, script) as untar:
            count = 0
            for key, entries in source.rest(first):
                headers = [tar_header(entry) for entry in entries]
                padded = sum(e.size + -e.size % TAR_BLOCK for e in entries)
                size = sum(map(len, headers)) + padded + 2 * TAR_BLOCK
                untar.send(b"%d %s\n" % (size, key.encode()))
                for portion in self._tar_portions(headers, entries):
                    if not untar.send(portion):
                        break  # the answer says why it takes no more
                count += 1
                if not untar.send(b".\n"):
                    break
            untar.end()
            for _ in range(count):
                untar.answer(b"done")
            untar.answer(b"end")

    def _tar_portions(self, headers: list[bytes], entries: list[FileEntry]) -> Iterator[bytes]:
        """Yield a tar archive in portions that are worth a packet."""
        portion = bytearray()
        for header, entry in zip(headers, entries, strict=True):
            with about(entry):
                portion += header
                for piece in self._tree.pieces(entry, 0, entry.size) if entry.kind == "f" else ():
                    portion += piece
                    if len(portion) >= TRANSFER_PIECE:
                        yield bytes(portion)
                        portion.clear()
                portion += bytes(-entry.size % TAR_BLOCK)
                if entry.kind == "f":
                    self._transfer.moved(entry, entry.size)
        yield bytes(portion + bytes(2 * TAR_BLOCK))

    # --- checks ---

    def _check_sent(self) -> None:
        """Compare what an earlier upload has sent, and with ``verify`` all small files."""
        if any(source.left for source in self._sources):
            raise NoChannelError("the machine opened no further channel")
        for source in self._files:
            self._check_chunks(source)
        bundles = self._bundles.every if self._options.verify else self._bundles.earlier
        files = [entry for entries in bundles for entry in entries if entry.kind == "f"]
        if files:
            self._check_files(files)
        for entries in self._bundles.earlier:
            for entry in entries:
                if entry.kind == "f":
                    self._transfer.count(entry, entry.size)

    def _check_chunks(self, source: Chunks) -> None:
        entry = source.entry
        if not entry.size:
            self._transfer.count(entry, 0)
        if not source.earlier:
            return
        with about(entry), self._digests(CHUNK_DIGESTS, entry.name) as there:
            for start, size in source.earlier:
                there.send(b"%d %d\n" % (start // BLOCK, size))
            there.end()
            for start, size in source.earlier:
                (digest,) = parse_digests(there.line() + b"\n", 1)
                if digest != file_digest(self._tree.place(entry), start, size):
                    self._differs()
                self._transfer.count(entry, size)

    def _check_files(self, files: list[FileEntry]) -> None:
        with self._digests(FILE_DIGESTS, b"") as there:
            for entry in changed_files(there, files, self._tree.place):
                with about(entry):
                    self._differs()

    def _digests(self, body: str, inner: bytes) -> RemoteScript:
        where = TARGET + 'path=$p; [ "$kind" = f ] || path=$p/$inner\n'
        script = remote_script("digests", where + body, **self._values, inner=inner)
        return self._transfer.script(self._transfer.pool.ssh, script)

    def _differs(self) -> None:
        if self._control is not None:
            self._control.send(b"wipe\n")
        raise SSHError("SHA-256 differs: what had arrived is not what is here, and is removed")

    def _check_tree(self, control: RemoteScript) -> None:
        """Compare names and sizes of all that has arrived."""
        control.send(b"list\n")
        there: dict[bytes, tuple[str, int]] = {}

        def take(mode: int, size: int, mtime: int, name: bytes) -> None:
            kind = "f" if stat.S_ISREG(mode) else "d" if stat.S_ISDIR(mode) else "l"
            there[name] = (kind, size if kind == "f" else 0)

        text = control.until(self._values["token"].encode(), MAX_ANSWER)
        parse_listing(text, len(self._tree.entries) * 2 + 100, take)
        for entry in self._tree.entries:
            if there.get(entry.name) != (entry.kind, entry.size):
                with about(entry):
                    found = there.get(entry.name)
                    raise SSHError(f"it has {found[1]} bytes there" if found else "it is not there")

    def _set_modes(self) -> None:
        """Give modes and times to large files and directories, the deepest first."""
        preserve = self._options.preserve
        folders = [entry for entry in self._tree.entries if entry.kind == "d"]
        odd = [entry for entry in folders if preserve or entry.mode & 0o700 != 0o700]
        entries = [source.entry for source in self._files] + odd[::-1]
        for first in range(0, len(entries), META_LINES):
            script = self._mode_script(entries[first : first + META_LINES])
            with self._transfer.script(self._transfer.pool.ssh, script) as running:
                running.end()
                running.answer(b"ok")

    def _mode_script(self, entries: list[FileEntry]) -> bytes:
        lines = [remote_script("modes", TARGET + 'cd "$p" || exit 1\n', **self._values)]
        for entry in entries:
            lines.append(b"g=" + sh_quoted(b"./" + entry.name))
            lines.append(b'chmod %o "$g" || no "$g"' % entry.mode)
            if self._options.preserve:
                lines.append(b'TZ=UTC0 touch -t %s "$g"' % touch_time(entry.mtime).encode())
        return b"\n".join([*lines, b"echo ok"])


def touch_time(mtime: int) -> str:
    """Return a time, given in nanoseconds, for ``touch -t`` in UTC."""
    seconds = min(max(mtime // 10**9, 0), LAST_TIME)
    return time.strftime("%Y%m%d%H%M.%S", time.gmtime(seconds))


def tar_header(entry: FileEntry) -> bytes:
    """Return what stands before an entry in a tar stream; no user's name or number goes out."""
    import tarfile  # not cheap

    info = tarfile.TarInfo("./" + os.fsdecode(entry.name))
    # Files are to come into a directory, whatever its mode will be.
    info.mode = entry.mode | 0o700 if entry.kind == "d" else entry.mode
    info.size, info.mtime = entry.size, entry.mtime // 10**9
    kinds = {"d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "f": tarfile.REGTYPE}
    info.type, info.linkname = kinds[entry.kind], os.fsdecode(entry.link)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
