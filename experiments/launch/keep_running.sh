#!/bin/bash
# Usage: keep_running.sh COMMAND [FLAGS...], on every worker of a TPU VM, where nothing else restarts a process.
# Runs `python -m unihetero_jax COMMAND FLAGS...` until it ends with 0 (done) or 2 (bad input), or until this script gets
# SIGTERM, which it hands on once. A lost peer shows as 75, 76, an abort or an exception, so every other code starts it
# again: always after 143, which is a saved stop, else at most MAX_RESTARTS times.
set -uo pipefail
: "${MAX_RESTARTS:=20}" "${PYTHON:=.venv/bin/python}" "${PAUSE_S:=10}"
# shellcheck source=experiments/launch/tpu.env
. experiments/launch/tpu.env

stopped="" child="" handed_on="" restarts=0
hand_on() { # once: a second signal would end the program at once
  [[ -z $child || -n $handed_on ]] || { handed_on=yes; kill -TERM "$child"; }
}
trap 'stopped=yes; hand_on' TERM
while [[ -z $stopped ]]; do
  "$PYTHON" -m unihetero_jax "$@" &
  child=$!
  [[ -z $stopped ]] || hand_on # the signal came before there was a child to hand it to
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # the trap cut the wait short: the program is still saving
    wait "$child"
    code=$?
  done
  child=""
  case $code in
    0 | 2) exit "$code" ;;
    143) ;;
    *) ((++restarts <= MAX_RESTARTS)) || { echo "keep_running.sh: exit code $code once more: given up" >&2; exit "$code"; } ;;
  esac
  [[ -n $stopped ]] || { echo "keep_running.sh: exit code $code, starting again" >&2; sleep "$PAUSE_S"; }
done
exit "${code:-143}"
