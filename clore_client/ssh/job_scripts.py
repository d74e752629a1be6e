"""Start, watch and stop a job on a host: shell scripts with POSIX tools and /proc."""

from __future__ import annotations

# Prints the start time of the process $1 in clock ticks; nothing for an ended process or a zombie.
_TICKS = r"""
ticks() {
  [ -e /proc/self ] || { kill -s 0 "$1" 2>/dev/null && echo 0; return; }
  { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
  s=${s##*) }; set -- $s; [ "$1" != Z ] && echo "${20}"
}
"""
# Runs in a session of its own. $1 is the folder of the job, $2 a shell, $3 the command, $4 the
# umask, and $5 the boot and the time. SIGTERM goes to the whole group: this shell ignores it, so
# that it can record the exit code. It needs no other program and no free space on the disk.
JOB_RUNNER = (
    _TICKS
    + r"""
trap "" HUP; trap : TERM INT QUIT
echo "$$ $(ticks $$ || echo -) $5" >"$1/pid"
umask "$4"
# Start-up files may change the directory.
CLORE_JOB_CWD=$PWD "$2" -c 'cd "$CLORE_JOB_CWD"; '"$3"
printf "%-4s\n" $? 1<>"$1/exit"
"""
)
# Precedes each of the scripts that follow.
_JOBS = (
    _TICKS
    + r"""
jobs=$PWD/.clore/jobs
nap() { sleep "$1" 2>/dev/null || sleep 1; }
boot() { # prints an id that changes when the host or its container restarts
  r=; { read -r r </proc/sys/kernel/random/boot_id; } 2>/dev/null
  echo "$r/$(ticks 1)"
}
about() { # reads the state of the job $1 into $st, $code, $pid and $began
  st=gone code=- pid=- began=0
  j=$jobs/$1
  [ -d "$j" ] || return 1
  w=0; until { read -r pid ticks boot began <"$j/pid"; } 2>/dev/null; do
    pid=- ticks= boot= began=0 # it is starting, or its start was interrupted
    w=$((w+1)); [ $w -lt 20 ] || break
    nap 0.1
  done
  b=$(ticks "$pid")
  st=killed; [ "$boot" = "$(boot)" ] || st=lost
  if [ -n "$ticks" ] && [ "$b" = "$ticks" ] && [ $st != lost ]; then st=running; fi
  # Read last, because a job may end in between.
  { read -r code <"$j/exit"; } 2>/dev/null || code=-
  [ "$code" = - ] || st=exited
}
"""
)
_JOB_SCRIPTS = {
    # This script is read from standard input, so that no list of processes shows ``env``.
    "job": r"""
detach=$(command -v setsid) # without it, the job stays in this session
shell=${SHELL:-/bin/sh}; [ -x "$shell" ] || shell=/bin/sh
u=$(umask); umask 077
[ -d "$cwd" ] || no "there is no directory $cwd"
mkdir -p "$jobs" && chmod 700 .clore "$jobs" || exit 1
d=$jobs/$name
if ! e=$(mkdir "$d" 2>&1); then
  [ ! -d "$d" ] || no "there is already a job $name: wait for it, remove() it, or pass another name"
  no "$e"
fi
echo - >"$d/exit" && printf "%s\n" "$command" >"$d/command" && : >"$d/output" ||
  no "nothing can be written to $d"
now=$(date +%s) boot=$(boot)
(
  if [ -n "$a" ]; then LC_ALL=$a; else unset LC_ALL; fi
  cd "$cwd" || exit 1
  set -- $detach /bin/sh -c "$runner" "job-$name" "$d" "$shell" "$command" "$u" "$boot $now"
  eval "$exports"
  exec "$@"
) </dev/null >>"$d/output" 2>&1 &
about "$name"
[ "$began" != 0 ] || no "the job did not start: $(head -c 300 "$d/output")"
echo "started $began"
""",
    # Prints a line for each job, or for the job $name: its state, and the start of its command.
    "jobs": r"""
for j in "$jobs"/${name:-*}; do
  k=${j##*/}
  about "$k" || continue
  echo "job $k $st $code $began"
  head -n 1 "$j/command" 2>/dev/null | head -c 1000 | tr -d "$n"; echo
done
echo end
""",
    # Prints the last $lines lines of the output.
    "tail": r"""
about "$name" || no "there is no job $name"
echo tail
tail -n "$lines" "$j/output" | tail -c "$most"
""",
    # Prints the output from byte $at on, in portions that a line with their size precedes, until
    # the job has ended. If $at is -1, it prints no output. The size is 0 if there is nothing new.
    "follow": r"""
about "$name" || no "there is no job $name"
o=$j/output
span() { # prints $2 bytes from byte $1 on
  dd if="$o" bs=65536 skip=$(($1/65536)) 2>/dev/null | tail -c +$(($1%65536+1)) | head -c "$2"
}
while :; do
  about "$name"
  s=$(stat -c %s "$o" 2>/dev/null || wc -c <"$o"); s=$((s))
  if [ "$at" -ge 0 ] && [ "$s" -gt "$at" ]; then
    k=$((s-at)); [ $k -le 1048576 ] || k=1048576
    echo "$k" && span "$at" $k || exit 1
    at=$((at+k))
  elif [ "$st" = running ]; then
    echo 0 || exit 1
    nap 0.3
  else
    echo "end $st $code $began"; exit 0
  fi
done
""",
    # Ends all processes of the job: those of its session and group, and descendants elsewhere.
    "stop": r"""
about "$name" || no "there is no job $name"
sig() { # with a group's number, dash needs "--", and busybox accepts none
  for p in $2; do kill -s "$1" -- "$p" 2>/dev/null || kill -s "$1" "$p" 2>/dev/null; done
}
tree() {
  for c in $(cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$c"; done; echo "$1"
}
members() { # prints the processes that have not ended
  [ -e /proc/self ] || { sig 0 "-$pid" && echo "-$pid"; return; }
  for f in /proc/[0-9]*/stat; do
    { read -r s <"$f"; } 2>/dev/null || continue
    f=${f%/stat}; s=${s##*) }; set -- $s
    [ "$1" != Z ] || continue
    if [ "$3" = "$pid" ] || [ "$4" = "$pid" ]; then echo "${f#/proc/}"; continue; fi
    for p in $known; do [ "${f#/proc/}" != "$p" ] || echo "$p"; done
  done
}
# The number may belong to another process by now.
if [ "$st" = lost ] || [ "$pid" = - ] || { [ -n "$b" ] && [ "$b" != "$ticks" ]; }; then
  echo "stopped"; exit 0
fi
known=; [ -z "$b" ] || known=$(tree "$pid")
sig TERM "$(members)"
gone() { # waits up to $1 tenths of a second for the end of all members
  w=0; while m=$(members); [ -n "$m" ]; do
    [ $w -lt "$1" ] || return 1
    w=$((w+1)); sleep 0.1 2>/dev/null || { sleep 1; w=$((w+9)); }
  done
}
if ! gone "$grace"; then
  # The shell that records the exit code goes last.
  for q in $m; do [ "$q" = "$pid" ] || sig KILL "$q"; done
  gone 10 || sig KILL "$m"
fi
echo stopped
""",
    # Removes a job that has ended, with its output.
    "remove": r"""
about "$name" || no "there is no job $name"
[ "$st" != running ] || no "the job $name still runs: stop() it first"
rm -rf "$j" || exit 1
echo removed
""",
}


def job_script(verb: str) -> str:
    """Return the script for a verb."""
    return _JOBS + _JOB_SCRIPTS[verb]
