#!/usr/bin/env bash
# A run on all workers of a TPU slice of Google Cloud, without Kubernetes. Step by step:
#
#   export NAME=staged ZONE=us-east5-a TYPE=v5p-16 VERSION=v2-alpha-tpuv5
#   launch/tpu_vm.sh create --spot        # asks for the slice, as a queued resource; then: launch/tpu_vm.sh status
#   launch/tpu_vm.sh setup                # copies this folder to each worker and installs it there
#   launch/tpu_vm.sh run --config=configs/staged.py:qwen3_vl_8b --workdir=/shared/runs/staged --config.checkpoint=DIR
#   launch/tpu_vm.sh logs | stop | delete
#
# --workdir has to be on a file system that all workers have mounted (Filestore, NFS). `stop` lets the run save. `run` again
# goes on from the last checkpoint; after a preemption: delete, create, setup, run.
set -euo pipefail
: "${NAME:?the name of the slice, as export NAME=staged}" "${ZONE:?its zone, as export ZONE=us-east5-a}"
cd "$(dirname "$0")/.."
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }
action=${1:-help}
shift || true
case $action in
create)
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="${TYPE:?as v5p-16}" --runtime-version="${VERSION:?as v2-alpha-tpuv5}" "$@"
  ;;
status) gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)" ;;
setup)
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' EXIT
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:capcur.tar.gz" --zone="$ZONE" --worker=all
  everywhere 'mkdir -p capcur && tar -xzf capcur.tar.gz -C capcur && cd capcur && python3 -m venv .venv &&
    .venv/bin/pip install -q -c constraints.txt -e ".[tpu]"'
  ;;
run)  # in the background of each worker: it outlives this connection
  [ $# -gt 0 ] || { echo "error: run needs --config and --workdir" >&2; exit 2; }
  everywhere "cd capcur || exit; nohup .venv/bin/python -m capcur_jax.main $(printf '%q ' "$@") \
    >>run.log 2>&1 </dev/null & echo \$! >run.pid"
  ;;
logs) gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${1:-0}" --command='tail -n 100 -F capcur/run.log' ;;
stop) everywhere "kill -TERM \$(cat capcur/run.pid)" ;;
delete) gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
*)
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
