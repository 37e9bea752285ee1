# shellcheck shell=bash
# Shared by the launchers: stop with a message, show a command or run it.

dry_run=false # set by --dry-run

# Print one line on standard error and stop with code 2.
fail() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Print words as one line, quoted for a shell.
show() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Run a command, or only show it under --dry-run.
run() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# Stop unless the option $1 has a value; call as: needs "$@"
needs() {
  [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value; see --help"
}

# Print the opening comment of a script $1.
help_of() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}
