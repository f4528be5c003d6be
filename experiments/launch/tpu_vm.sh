#!/bin/bash
# Usage: tpu_vm.sh create | setup | train FLAGS... | log | stop | delete
# One run on all workers of a TPU slice, or of NUM_SLICES slices, by gcloud from your own machine. Change the first lines
# or set them in the environment.
set -euo pipefail
: "${PROJECT:?set PROJECT to the Google Cloud project}" "${ZONE:?set ZONE, e.g. us-west4-a}" "${NAME:=unihetero}"
: "${ACCELERATOR_TYPE:=v5litepod-256}" "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}" "${NUM_SLICES:=1}" "${SPOT:=}"
: "${REPOSITORY:=}" "${REVISION:=main}" # where the workers clone from; a branch or tag
where=(--project="$PROJECT" --zone="$ZONE")

on_workers() { # runs a shell line on every worker of every slice, from the home folder
  if ((NUM_SLICES == 1)); then
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
  else
    gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" --node=all --worker=all --command="$1"
  fi
}

action=${1:-}
shift || true
case $action in
  create)
    if ((NUM_SLICES == 1)); then
      gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" \
        --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" ${SPOT:+--spot}
    else # several slices joined over the data-centre network come as one queued resource; wait until it is ACTIVE
      gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-count="$NUM_SLICES" --node-prefix="$NAME" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot}
    fi
    ;;
  setup)
    : "${REPOSITORY:?set REPOSITORY to the address that the workers clone from}"
    # uv brings a Python of its own: that of some runtime versions is older than 3.11.
    on_workers "rm -rf unihetero && git clone --depth=1 --branch $(printf %q "$REVISION") $(printf %q "$REPOSITORY") unihetero &&
      cd unihetero && python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --python=3.11 .venv &&
      ~/.local/bin/uv pip install --quiet -c constraints.txt -e '.[gcs]' 'jax[tpu]'"
    ;;
  train) # the flags of `python -m unihetero_jax train`; the workdir is a gs:// path, or a folder that all workers mount
    on_workers "cd unihetero && { setsid nohup bash experiments/launch/keep_running.sh train $(printf '%q ' "$@") \
      >>train.log 2>&1 </dev/null & echo \$! >train.pid; }"
    ;;
  log) on_workers "tail -n 5 unihetero/train.log" ;;
  stop) on_workers "kill -TERM \$(cat unihetero/train.pid)" ;; # saves and ends; `train` with the same flags goes on
  delete)
    if ((NUM_SLICES == 1)); then
      gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
    else
      gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --quiet --force
    fi
    ;;
  *)
    echo "usage: tpu_vm.sh create | setup | train FLAGS... | log | stop | delete" >&2
    exit 2
    ;;
esac
