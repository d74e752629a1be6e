"""Define the shell scripts of a transfer, for POSIX tools and those of GNU and busybox."""

from __future__ import annotations

import re

from clore_client.errors import SSHError
from clore_client.validation import short_repr

DIFFERS = "SHA-256 differs: the received data was removed"
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a listing, or of digests

# Precedes each script. Relative paths count from the home directory, even if a start-up file
# changes the directory. $n is a line end, set before. openssl is up to six times as fast as
# sha256sum.
PRELUDE = r"""
unset CDPATH
g=; last=
no() { printf "no %s%s" "$*" "$n"; exit 1; }
cd "${HOME:-/}" || no "there is no home directory ${HOME}"
if command -v openssl >/dev/null; then sha="openssl dgst -sha256 -r"; else sha=sha256sum; fi
block=65536
part() { # prints $3 bytes of the file $1 from its block $2 on
  if [ $(($3 % block)) = 0 ]; then blocks "$1" "$2" $(($3 / block))
  else blocks "$1" "$2" $(($3 / block + 1)) | head -c "$3"; fi
}
blocks() { dd if="$1" bs=$block skip="$2" count="$3" iflag=fullblock 2>/dev/null; }
inner() { # sets $g to the name that $q encodes, see encoded_name()
  [ "$q" = "$last" ] || { g=$(printf %bx "$q"); g=${g%x}; last=$q; }
}
list() { find . -exec stat -c "%f %s %Y %n" {} +; }
"""
# Ends with the name of a tool that is missing.
CHECK_TOOLS = r"""
for t in chmod dd find head mkdir mv rm ${sha%% *} sort stat tar touch xargs; do
  command -v $t >/dev/null || no "lacks $t"
done
[ "$(echo abcdef | dd ibs=3 count=1 obs=4 iflag=fullblock 2>/dev/null)" = abc ] ||
  no "lacks a dd with iflag=fullblock"
stat -c "%f %s %Y %a" . >/dev/null 2>&1 || no "lacks a stat with -c"
"""
# Sets $f to the target and $p to the temporary name beside it; $r records the received data.
TARGET = r"""
case $f in /*) ;; *) f=$PWD/${f#./};; esac
if [ "$kind" = d ]; then
  [ "$content" = 1 ] || f=${f%/}/$name
elif [ -d "$f" ]; then f=${f%/}/$name
else case $f in */) f=$f$name;; esac; fi
f=${f%/}; f=${f:-/}
if [ -h "$f" ] && [ ! -d "$f" ]; then
  [ "$follow" = 1 ] || no "$f is a symlink: remove it, or pass symlinks='follow'"
  f=$(readlink -f "$f") || no "$f is a broken symlink"
fi
d=${f%/*}; d=${d:-/}
if [ "$kind" = f ]; then
  [ ! -d "$f" ] || no "$f is a directory"
  [ ! -e "$f" ] || [ -f "$f" ] || no "$f is neither a file nor a directory"
else [ ! -e "$f" ] || [ -d "$f" ] || no "$f is not a directory"; fi
p=${d%/}/.clore-part-$token
r=$p.done
"""
# Runs during the whole upload: creates the temporary name, and renames it at the end. If it stops
# before that, it removes the temporary name, unless the upload may be resumed. With resume, two
# uploads may share the temporary name: only the last one that began may continue.
CONTROL = r"""
[ -d "$d" ] || e=$(mkdir -p "$d" 2>&1) || no "there is no directory $d: ${e%%$n*}"
u=$(umask); umask 077
make() {
  if [ "$kind" = f ]; then : >>"$p"; else mkdir -p "$p"; fi || return 1
  [ "$keep" = 0 ] || echo "$owner" >"$o"
}
o=$p.owner
wipe() { rm -rf "$p" "$r" "$o" || { sleep 1; rm -rf "$p" "$r" "$o"; }; }
# Again a little later: a dd that was just starting may have created the file anew.
wipe_all() { wipe; sleep 0.2 2>/dev/null || sleep 1; wipe; }
gone() { [ "$keep" = 1 ] || wipe_all; exit 1; }
trap gone HUP TERM
[ "$keep" = 1 ] && [ -s "$r" ] && [ -e "$p" ] || wipe
make || no "nothing can be created in $d"
no() { [ "$keep" = 1 ] || wipe; printf "no %s%s" "$*" "$n"; exit 1; }
printf "ready %s\n" "$u"
[ ! -s "$r" ] || { cat "$r"; echo; }
echo "$token"
set_mode() {
  m=$(printf %o $((0$mode & ~0$u)))
  [ ! -e "$f" ] || m=$(stat -c %a "$f")
  [ "$preserve" = 0 ] || m=$mode
  chmod "$m" "$p" || gone
  [ "$preserve" = 0 ] || TZ=UTC0 touch -t "$time" "$p" || gone
}
finish_file() {
  s=$(stat -c %s "$p"); [ "$s" = "$size" ] || no "$s of $size bytes arrived"
  set_mode
  mv -f "$p" "$f" || gone
}
finish_tree() {
  if [ ! -e "$f" ]; then set_mode; mv "$p" "$f" || gone; return; fi
  cd "$p" || gone
  export preserve follow
  wrong=$(find . ! -name . -exec sh -c 'for g; do
    t=$0/${g#./} folder=0
    [ -L "$g" ] || [ ! -d "$g" ] || folder=1
    if [ "$follow" = 0 ] && [ -L "$t" ] && [ ! -L "$g" ]; then echo "$t is a symlink"
    elif [ $folder = 0 ] && [ -d "$t" ] && [ ! -L "$t" ]; then echo "$t is a directory"
    elif [ $folder = 1 ] && [ -e "$t" ] && [ ! -d "$t" ]; then echo "$t is not a directory"
    fi; done' "$f" {} +)
  [ -z "$wrong" ] || no "${wrong%%$n*}"
  # A directory that is new there is moved as a whole, with its modes and times.
  find . -type d -exec sh -c '[ ! -e "$0/$1" ] && mv "$1" "$0/$1"' "$f" {} \; -prune
  find . ! -type d -exec sh -c 'for g; do
    [ "$preserve" = 1 ] || [ ! -f "$0/$g" ] || [ ! -f "$g" ] || chmod "$(stat -c %a "$0/$g")" "$g"
    [ ! -L "$0/$g" ] || rm -f "$0/$g"  # mv would move into the directory that it leads to
    mv -f "$g" "$0/$g" || exit 1; done' "$f" {} + || gone
  cd / && rm -rf "$p"
}
while read -r word m t q || gone; do case $word in
restart) wipe; make;;
wipe) wipe; exit 1;;
mode) inner; chmod "$m" "$p$g" || no "$g: its mode was not set"
  [ "$preserve" = 0 ] || TZ=UTC0 touch -t "$t" "$p$g" || no "$g: its time was not set";;
sync) echo "$token";;
list) (cd "$p" && list);;
go) [ "$keep" = 0 ] || [ "$(cat "$o" 2>/dev/null)" = "$owner" ] || {
  printf "no another upload of the same has begun%s" "$n"; exit 1; }
  if [ "$kind" = f ]; then finish_file; else finish_tree; fi
  rm -f "$r" "$o"; printf "ok %s\n" "$f"; exit 0;;
*) gone;;
esac; done
"""
# Prints the target and a listing of it, which is empty if there is none.
LIST_TARGET = r"""
printf "target %s\n" "$f"
if [ "$kind" = d ]; then [ ! -d "$f" ] || (cd "$f" && list)
else [ ! -f "$f" ] || stat -L -c "%f %s %Y ." "$f"; fi
echo "$token"
"""
# Removes the files or the empty directories below the target whose names it reads.
REMOVE = r"""
cd "$f" || exit 1
if [ "$what" = d ]; then xargs -0 rmdir 2>/dev/null; else xargs -0 rm -f || exit 1; fi
echo removed
"""
# Writes portions: before each comes a line (block, size, key, name), after it a dot. A portion is
# a chunk of a file, or a tar archive where the block is "tar".
# It starts at the same time as CONTROL, and waits for the temporary name.
PUT = r"""
w=0; until [ -e "$p" ]; do
  w=$((w+1)); [ $w -lt 500 ] || no "the upload did not start"
  sleep 0.02 2>/dev/null || sleep 1
done
umask 077
c=$conv
put() { dd of="$p$g" ibs="$s" count=1 obs=$block seek="$k" iflag=fullblock conv=$c 2>&1; }
archive() { dd ibs="$s" count=1 obs=$block iflag=fullblock 2>/dev/null; }
untar() { cd "$p" && archive | tar -x"$how"f - 2>&1; }
while read -r k s key q && [ -e "$p" ]; do
  if [ "$k" = tar ]; then e=$(untar) || no "${e%%$n*}"
  else
    [ "$q" = "$last" ] || { inner; mkdir -p "$p${g%/*}" && : >>"$p$g" || exit 1; }
    # A dd without conv=sparse fails before it reads anything.
    e=$(put) || { case $e in *sparse*) c=notrunc; e=$(put);; *) false;; esac; } || no "${e%%$n*}"
  fi
  read -r t && [ "$t" = . ] || exit 1
  h=-; [ "$k" = tar ] || [ "$hash" = 0 ] || h=$(part "$p$g" "$k" "$s" | $sha)
  [ "$keep" = 0 ] || echo "$key" >>"$r"
  echo "done ${h%% *}"
done
echo end
"""
# Print SHA-256: of each chunk for which a line (block, size, name) comes, and of each file that is
# named, in the order of the names. ``sort`` reads all names before the first output, which would
# block if the client still sent names instead of reading it.
CHUNK_DIGESTS = r"""while read -r k s q; do inner; part "$path$g" "$k" "$s" | $sha; done"""
FILE_DIGESTS = r"""cd "$path" && sort -z | xargs -0 $sha"""
# Prints the type of the source, then a listing, or the content of a file that is not too large.
LOOK = r"""
if [ -d "$f" ]; then
  cd "$f" || no "$f: it cannot be entered"
  echo d; list; echo "$token"
elif [ -f "$f" ]; then
  s=$(stat -L -c "%s %Y %a" "$f") || exit 1
  size=${s%% *}
  [ "$size" -gt 0 ] || size=$(($(wc -c <"$f"))) # files in /proc have size 0
  echo "f $size ${s#* }"
  [ "$size" -le "$most" ] || exit 0
  part "$f" 0 "$size"
  [ "${s%% *}" -gt 0 ] || { echo "$size ${s#* }"; exit 0; }
  stat -L -c "%s %Y %a" "$f"
elif [ -e "$f" ]; then no "it is neither a file nor a directory"
else no "there is no such file"; fi
"""
# Prints a tar archive of the files whose names it reads, a block with a mark, and a new listing.
GET_TREE = r"""
cd "$f" || exit 1
sort -z | xargs -0 tar -cf -
printf "%-511s\n" "$token"; list; echo "$token"
"""
# Prints a range of a file, its SHA-256, and the state of the file after that.
GET = r"""
part "$f" "$k" "$s"; part "$f" "$k" "$s" | $sha
stat -L -c "%s %Y %a" "$f"
"""


def script_text(verb: str, *parts: str, **values: bytes | str | int) -> bytes:
    """Return a script of these parts with ``values`` as shell variables; ``verb`` names it."""
    lines = [b": " + verb.encode()]
    lines += [name.encode() + b"=" + sh_quoted(value) for name, value in values.items()]
    return b"\n".join([*lines, *(part.encode() for part in (PRELUDE, *parts))])


def sh_quoted(value: bytes | str | int) -> bytes:
    """Quote a value for ``sh``."""
    raw = value if isinstance(value, bytes) else str(value).encode()
    return b"'" + raw.replace(b"'", b"'\"'\"'") + b"'"


def encoded_name(name: bytes) -> bytes:
    """Return a slash and the name of a file, as ``printf %b`` reads them; nothing for no name."""
    plain = re.sub(rb"[^\w./-]", lambda sign: b"\\0%03o" % ord(sign[0]), name)
    return b"/" + plain if name else b""


def remote_path(path: bytes) -> bytes:
    """Return a remote path for a script; one that is relative or begins with ~/ is below home."""
    if path == b"~" or path.startswith(b"~/"):
        path = path[1:].lstrip(b"/") or b"."
    elif path.startswith(b"~"):
        raise ValueError(f"remote: use ~/ or an absolute path, not {short_repr(path)}")
    return path if path.startswith(b"/") else b"./" + path


def parse_digests(text: bytes, count: int) -> list[str]:
    """Read the SHA-256 of each file from the output of sha256sum or openssl."""
    # Other lines are parts of names: not every sha256sum escapes line ends.
    digests = [s.decode() for s in re.findall(rb"^\\?([0-9a-f]{64}) [ *]", text, re.M)]
    if len(digests) != count:
        raise SSHError(f"the host sent {len(digests)} SHA-256 instead of {count}")
    return digests
