#!/usr/bin/env bash
# SGLang servers on a rollout node, for a trainer on other nodes. On each rollout node:
#
#   launch/sglang_servers.sh --config=configs/staged.py:qwen3_vl_8b --workdir=/shared/runs/staged \
#     --config.checkpoint=/shared/Qwen3-VL-8B \
#     --config.rollout.sglang.python=/shared/sglang/bin/python --config.rollout.sglang.servers=8 \
#     --config.rollout.sglang.port=30000
#
# It takes the trainer's own arguments, and starts the servers with the flags that the trainer needs. When they are
# healthy it prints their addresses as the trainer takes them; --register=DIR writes them to DIR/HOST.txt, too. The
# trainer also needs --config.rollout.sglang.weights=DIR, a folder that all these nodes see.
# HOST is how the trainer reaches this node, PYTHON another Python than .venv's. SIGTERM ends the servers.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m capcur_jax.rollout.sglang --host="${HOST:-$(hostname)}" "$@"
