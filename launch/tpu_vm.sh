#!/usr/bin/env bash
# A Cloud TPU slice (VMs of its own, through queued resources), from request to removal:
#   export NAME=b32 ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite SPOT=1
#   export SETUP='sudo mkdir -p /mnt/runs && sudo mount 10.0.0.2:/runs /mnt/runs'
#   launch/tpu_vm.sh train --config=configs/marqo_gs/vit_b32.py --workdir=/mnt/runs/b32
#   launch/tpu_vm.sh delete
# Commands:
#   create        requests the slice and waits for it
#   install       copies this checkout to all hosts, installs it, runs $SETUP there
#   run ARGS...   gcl_jax.train on all hosts
#   train ARGS... all of these; after a preemption again, until the training has ended
#   status        the state of the request
#   delete        gives the slice back, whatever its state
# $SETUP mounts the storage of --workdir, which all hosts share. PROJECT is gcloud's own by default.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0" >&2; exit 2; }
[[ $# -ge 1 ]] || usage
: "${NAME:?names the slice}" "${ZONE:?such as us-west4-a}"
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
pause=${PAUSE:-60}

status() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
    --accelerator-type="${ACCELERATOR:?such as v5litepod-256}" \
    --runtime-version="${RUNTIME:?such as v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
  local state
  until state=$(status) && [[ $state == ACTIVE ]]; do
    if [[ $state == FAILED || $state == NONE ]]; then
      echo "the request for $NAME is $state" >&2
      return 1
    fi
    sleep "$pause"
  done
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:gcl_jax.tar.gz" "${place[@]}" --worker=all
  rm "$archive"
  on_all "set -e; mkdir -p gcl_jax; tar -xzf gcl_jax.tar.gz -C gcl_jax; cd gcl_jax
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python=3.12
    python3 -m uv pip install --quiet --editable '.[tpu]'
    ${SETUP:-true}"
}

run() {
  on_all "cd gcl_jax && .venv/bin/python -m gcl_jax.train $(printf '%q ' "$@")"
}

train() {
  local code failures=0
  [[ $(status) == ACTIVE ]] || create
  install
  while true; do
    code=0
    run "$@" || code=$?
    # 2: the configuration or the data are wrong, and will be the next time.
    if [[ $code == 0 || $code == 2 ]]; then
      return "$code"
    fi
    echo "the training ended with $code; going on in $pause s" >&2
    sleep "$pause"
    if [[ $(status) != ACTIVE ]]; then
      failures=0
      delete || true
      create
      install
    elif ((++failures == 10)); then
      echo "$failures failures on a slice that is there: giving up" >&2
      return "$code"
    fi
  done
}

command=$1
shift
case $command in
  create | install | run | train | status | delete) "$command" "$@" ;;
  *) usage ;;
esac
