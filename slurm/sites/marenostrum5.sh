# shellcheck shell=bash disable=SC2034
# MareNostrum 5 ACC (BSC): 4 H100 of 64 GB a node, 80 cores, InfiniBand; no internet, on login nodes neither. Written on
# 2026-11-30 from users' scripts (partition acc, 20 cores with each GPU, singularity); BSC's own pages were not at hand.
# Not run there.
[[ ! ${STEPLADDER_CONTAINER:-} ]] || : "${STEPLADDER_MODULES=singularity}"
: "${WANDB_MODE=offline}"
