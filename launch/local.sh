#!/usr/bin/env bash
# Several processes on this machine as one run. Two of them:
#
#   launch/local.sh 2 --config=configs/staged.py --workdir=runs/staged
#
# With GPUs each process gets its share of them, of $CUDA_VISIBLE_DEVICES if that is set. Process 0 speaks here; the others
# write to WORKDIR/process-N.log. Ctrl-C and SIGTERM stop them all together, and the same command goes on.
# PYTHON names another Python than .venv's. One process needs no script: python -m capcur_jax.main.
set -euo pipefail
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
count=$1
shift
workdir=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
[ -n "$workdir" ] || { echo "error: --workdir=DIR is missing: the processes share it" >&2; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mkdir -p "$workdir"

gpus=()
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
fi
share=$((${#gpus[@]} / count))
[ ${#gpus[@]} -eq $((share * count)) ] ||
  { echo "error: ${#gpus[@]} GPUs can't be shared out evenly to $count processes" >&2; exit 2; }

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
process() {  # in a session of its own: Ctrl-C is for this script, which passes it on once
  if [ "$share" -gt 0 ]; then
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:$1 * share:share}")
    export CUDA_VISIBLE_DEVICES
  fi
  exec setsid "$python" -m capcur_jax.main "${@:2}" \
    --coordinator="localhost:$port" --process_id="$1" --process_count="$count"
}
running=()
trap 'kill -TERM "${running[@]}" 2>/dev/null || true' TERM INT
for ((i = 1; i < count; i++)); do
  process "$i" "$@" >>"$workdir/process-$i.log" 2>&1 &
  running+=($!)
done
process 0 "$@" &
running+=($!)

# The first that fails ends the others, which would wait for it; after a signal all end by themselves.
worst=0
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for process in "${running[@]}"; do
    if kill -0 "$process" 2>/dev/null; then left+=("$process"); continue; fi
    code=0
    wait "$process" || code=$?
    [ $code -le $worst ] || worst=$code
    [ $code -eq 0 ] || [ $code -eq 130 ] || kill -TERM "${running[@]}" 2>/dev/null || true
  done
  running=("${left[@]}")
  sleep 0.5 || true  # Ctrl-C ends it, too
done
exit $worst
