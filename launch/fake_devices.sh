#!/usr/bin/env bash
# Runs a command on N fake CPU devices, to try a mesh without accelerators:
#   launch/fake_devices.sh 8 python -m gcl_jax.train --config=configs/emoji_tiny.py \
#     --workdir=runs/mesh --config.mesh.fsdp=2
# The devices share this machine's cores: it shows that a mesh works, never how fast it is.
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 DEVICES COMMAND..." >&2
  exit 2
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=$1 ${XLA_FLAGS:-}"
shift
exec "$@"
