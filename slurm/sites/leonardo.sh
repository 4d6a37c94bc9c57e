# shellcheck shell=bash disable=SC2034
# Leonardo Booster (CINECA): 4 A100 of 64 GB a node, 32 cores, InfiniBand; compute nodes have no internet. Written on
# 2026-11-30 from docs.hpc.cineca.it/hpc/leonardo.html, and from users' scripts where that page is silent; not run there.
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH}"
: "${WANDB_MODE=offline}"
