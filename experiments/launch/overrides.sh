#!/bin/bash
# Usage: overrides.sh FILE INDEX
# Prints the flags of line INDEX of FILE, one a line. Blank lines and those that start with # do not count; the first is
# line 0. Quotes and backslashes group words as xargs reads them, so a value may hold spaces; nothing is expanded.
set -euo pipefail
file=${1:?usage: overrides.sh FILE INDEX} index=${2:?usage: overrides.sh FILE INDEX}

[[ -f $file ]] || { echo "overrides.sh: there is no file $file; name one with a set of flags on each line" >&2; exit 2; }
[[ $index =~ ^[0-9]+$ ]] || { echo "overrides.sh: index '$index' is no number from 0 up" >&2; exit 2; }
mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$file")
if ((10#$index >= ${#lines[@]})); then
  echo "overrides.sh: $file has lines 0 to $((${#lines[@]} - 1)), asked for $index; make the array fit the file" >&2
  exit 2
fi
xargs printf '%s\n' <<<"${lines[10#$index]}" || { echo "overrides.sh: $file, line $index: unmatched quote" >&2; exit 2; }
