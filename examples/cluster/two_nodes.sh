#!/bin/sh
# Two "nodes" of one process each on this machine: what torchrun does on two machines, tried before it is tried there.
#   sh two_nodes.sh clip schedule.steps=50 run.name=nodes
set -eu
# Each start gets a store of its own: with a shared one, processes that start again may read the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
node() {
    torchrun --nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-id fastvlp --rdzv-backend c10d \
        --rdzv-endpoint "127.0.0.1:${PORT:-29400}" -m fastvlp train "$@"
}
node "$@" &
other=$!
node "$@"
wait "$other"
