#!/usr/bin/env bash
# A Cloud TPU slice (VMs of its own, through queued resources), from request to removal:
#   export NAME=b32 ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   export CAPACITY=spot BUCKET=my-bucket
#   export STORE=/bucket/stores/marqo_gs_full_10m WORKDIR=/bucket/runs/b32
#   launch/tpu_vm.sh train --config=configs/marqo_gs/vit_b32.py
#   launch/tpu_vm.sh delete
# Commands:
#   create        requests the slice and waits for it
#   install       copies the commit that is checked out to all hosts, installs it, mounts the bucket
#   run ARGS...   gcl_jax.train on all hosts; ends what an earlier call left running there
#   train ARGS... all of these; after a preemption again, until the training has ended
#   status        the state of the slice
#   delete        gives the slice back, whatever its state
# Variables:
#   STORE, WORKDIR  the store and the folder of the run, on storage that all hosts see, or gs://...
#   BUCKET        a Cloud Storage bucket, which becomes /bucket on all hosts
#   SETUP         instead or besides: a command that mounts other storage on a host
#   EXTRAS        what is installed: tpu,text,gcp (text: tokenizers of E5, XLM-R and SigLIP)
#   CAPACITY      on-demand (default), spot, reserved, or flex-start, which lasts MAX_RUN (24h)
#   SLICES        how many slices of that type, which talk over the data-centre network (1)
#   CREATE_FLAGS  more flags for gcloud's create, such as --network=...
#   PROJECT       gcloud's own by default
#   DELETE=1      train gives the slice back at its end
# Ctrl-C lets the training save and end. Whatever leaves a slice that is billed says so at its end.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "$*" >&2; }
usage() { sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0" >&2; exit 2; }
[[ $# -ge 1 ]] || usage
: "${NAME:?names the slice}" "${ZONE:?such as us-west4-a}"
case $1 in run | train) : "${STORE:?names the store}" "${WORKDIR:?names the folder of the run}" ;; esac
[[ -z ${SPOT:-} ]] || { say "error: write CAPACITY=spot in place of SPOT=$SPOT"; exit 2; }
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
if [[ ${SLICES:-1} == 1 ]]; then
  nodes=("$NAME") asked=("--node-id=$NAME") on=(tpu-vm) all=(--worker=all)
elif [[ $SLICES =~ ^[1-9][0-9]{0,2}$ ]]; then
  mapfile -t nodes < <(seq -f "$NAME-%.0f" 0 $((SLICES - 1)))
  asked=("--node-count=$SLICES" "--node-prefix=$NAME") on=(queued-resources)
  all=(--worker=all --node=all)
else
  say "error: SLICES=$SLICES is not a number of slices"
  exit 2
fi
pause=${PAUSE:-60}
scratch=$(mktemp -d)
now="" # what is known of the slice
heard="" # whether gcloud has ever told
training="" # set while gcloud trains, in the background

# What gcloud knows of "queued-resources" or of "tpu-vm" ($1): the fields $2 of $3, or NONE. A call
# that fails says nothing about the slice, and is made again.
ask() {
  local tries=0 never="PERMISSION_DENIED|INVALID_ARGUMENT|gcloud auth login"
  while true; do
    answer=$(gcloud compute tpus "$1" describe "$3" "${place[@]}" --format="value($2)" \
      2>"$scratch/errors") || ! grep -q NOT_FOUND "$scratch/errors" || answer=NONE
    if [[ -n ${answer//[[:space:]]/} ]]; then
      heard=1
      return 0
    fi
    if ((++tries == 60)) || { [[ -z $heard ]] && grep -qE "$never" "$scratch/errors"; }; then
      now="in a state that gcloud does not tell"
      say "error: $(cat "$scratch/errors")"
      return 1
    fi
    say "gcloud does not tell the state of $NAME; asking again: $(tail -n 1 "$scratch/errors")"
    sleep "$pause"
  done
}

# Sets `now`: the state of the request, or of its VMs where these are not what it says.
look() {
  local node
  ask queued-resources state.state,state.stateInitiator "$NAME" || return
  case $answer in
    SUSPEND*USER) now="deleted by a user" ;;
    *) now=${answer%%[[:space:]]*} ;;
  esac
  [[ $now == ACTIVE ]] || return 0
  for node in "${nodes[@]}"; do
    ask tpu-vm state "$node" || return
    case $answer in
      READY) ;;
      NONE) now=TERMINATED ;;
      *) now=$answer ;;
    esac
    [[ $now == ACTIVE ]] || return 0
  done
}

request() {
  local track=() flags=()
  case ${CAPACITY:-on-demand} in
    on-demand) ;;
    spot | reserved) flags=("--$CAPACITY") ;;
    flex-start)
      track=(alpha)
      flags=(--provisioning-model=flex-start "--max-run-duration=${MAX_RUN:-24h}")
      ;;
    *) say "error: CAPACITY=$CAPACITY is not on-demand, spot, reserved or flex-start"; return 2 ;;
  esac
  : "${ACCELERATOR:?such as v5litepod-256}" "${RUNTIME:?such as v2-alpha-tpuv5-lite}"
  now=requested # whatever becomes of this call
  # shellcheck disable=SC2086  # CREATE_FLAGS are several words
  gcloud "${track[@]}" compute tpus queued-resources create "$NAME" "${asked[@]}" \
    "${place[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${flags[@]}" \
    ${CREATE_FLAGS:-}
}

create() {
  local before="" requests=0 code
  while true; do
    look || return 1
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      NONE)
        if ((++requests > 3)); then
          say "error: $NAME has been requested three times, in vain"
          return 1
        fi
        code=0
        request || code=$?
        if [[ $code == 2 ]]; then # gcloud has not understood the call
          now=NONE
          return 2
        fi
        [[ $code == 0 ]] || sleep "$pause" # it may have been made all the same: look again
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED | "deleted by a user")
        # There are no VMs any more, but the name is taken.
        [[ $now != FAILED ]] || gcloud compute tpus queued-resources describe "$NAME" \
          "${place[@]}" --format='yaml(state)' >&2 || true
        delete || return 1
        ;;
      STOPPED | UNKNOWN | HIDDEN)
        say "error: $NAME is $now: start it with gcloud, or delete it"
        return 1
        ;;
      *) sleep "$pause" ;; # on its way, to or fro
    esac
  done
}

delete() {
  local tries
  for tries in 1 2 3 4 5; do
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ||
      say "gcloud could not delete $NAME (call $tries)"
    look || return 1
    [[ $now != NONE ]] || return 0
    sleep "$pause"
  done
  return 1
}

on_all() {
  gcloud compute tpus "${on[@]}" ssh "$NAME" "${place[@]}" "${all[@]}" --command="$1"
}

# What a training needs of this machine. A training goes on with the commit that it began with.
pack() {
  local changed
  if [[ -z ${BUCKET:-}${SETUP:-} && ! (${STORE:-} == *://* && ${WORKDIR:-} == *://*) ]]; then
    say "error: set BUCKET (or SETUP), or STORE and WORKDIR to gs://...: all hosts must see them"
    return 2
  fi
  [[ ! -e $scratch/gcl_jax.tar.gz ]] || return 0
  say "installing commit $(git log -1 --format='%h %s')"
  changed=$(git status --porcelain)
  [[ -z $changed ]] || say "NOT in it, because not committed:"$'\n'"$changed"
  git archive --output="$scratch/gcl_jax.tar.gz" HEAD
}

install() {
  local mount=""
  if [[ -n ${BUCKET:-} ]]; then
    # The limit is for other programs: without it gcsfuse renames no folder with files on a flat
    # bucket. gcl_jax renames none there.
    mount="command -v gcsfuse >/dev/null || {
      key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
      curl -fsS \$apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
      echo \"deb [signed-by=\$key] \$apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse >/dev/null
    }
    mountpoint -q /bucket || {
      sudo mkdir -p /bucket && sudo chown \"\$USER\" /bucket
      gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf '%q' "$BUCKET") /bucket
    }"
  fi
  pack &&
    gcloud compute tpus "${on[@]}" scp "$scratch/gcl_jax.tar.gz" "$NAME:gcl_jax.tar.gz" \
      "${place[@]}" "${all[@]}" &&
    on_all "set -e; mkdir -p gcl_jax; tar -xzf gcl_jax.tar.gz -C gcl_jax; cd gcl_jax
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python=3.12
    python3 -m uv pip install --quiet --editable $(printf '%q' ".[${EXTRAS:-tpu,text,gcp}]")
    $mount
    ${SETUP:-true}"
}

# shellcheck disable=SC2016  # expanded on a host: the training gets SIGTERM, and time to save
end_training='if pid=$(cat gcl_jax.pid 2>/dev/null) &&
    grep -qs gcl_jax.train "/proc/$pid/cmdline" && kill "$pid"; then
    timeout 300 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"
  fi'

run() {
  local code=0 paths=("--config.data.store=$STORE" "--workdir=$WORKDIR")
  # In the background, where Ctrl-C does not cut the connection. gcloud makes a call whose
  # connection has broken again: then the first one's process is still there.
  training=1
  on_all "$end_training
    echo \$\$ > gcl_jax.pid; cd gcl_jax
    exec .venv/bin/python -m gcl_jax.train $(printf '%q ' "${paths[@]}" "$@")" &
  wait "$!" || code=$?
  training=""
  return "$code"
}

train() {
  local code failures=0 started
  pack || return # before anything is billed
  while true; do
    create || return
    started=$SECONDS code=0
    { install && run "$@"; } || code=$?
    # 2: the configuration or the data are wrong, and will be the next time.
    [[ $code != 0 && $code != 2 ]] || break
    say "ended with $code"
    look || return 1
    case $now in
      NONE | "deleted by a user")
        say "error: somebody else has deleted $NAME: the training ends"
        return "$code"
        ;;
      ACTIVE)
        ((SECONDS - started < 3600)) || failures=0
        # 143: it was told to stop, by maintenance say, and has saved.
        if [[ $code != 143 ]] && ((++failures == 10)); then
          say "error: ten failures in a row on a slice that is there"
          break
        fi
        ;;
      *) failures=0 ;;
    esac
    say "going on in $pause s"
    sleep "$pause"
  done
  [[ -z ${DELETE:-} ]] || delete
  return "$code"
}

interrupted() {
  trap 'exit 130' INT TERM HUP
  if [[ -n $training ]]; then
    say "the training saves and ends (once more: it goes on alone)"
    on_all "$end_training" || say "error: not all hosts could be told"
    [[ -z ${!:-} ]] || wait "$!" || true
  fi
  exit 130
}

at_end() {
  rm -rf "$scratch"
  [[ -z $now || $now == NONE || $now == "deleted by a user" ]] ||
    say "$NAME in $ZONE is left as it is ($now), and billed while it is there:" \
      "\`NAME=$NAME ZONE=$ZONE launch/tpu_vm.sh delete\` gives it back"
}

trap at_end EXIT
trap interrupted INT TERM HUP
command=$1
shift
case $command in
  create | train) "$command" "$@" ;;
  install | run)
    now=there
    "$command" "$@"
    ;;
  delete)
    now=there
    delete
    ;;
  status)
    look
    echo "$now"
    now=""
    ;;
  *) usage ;;
esac
