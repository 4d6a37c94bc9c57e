# shellcheck shell=bash disable=SC2034
# Alps (CSCS: Clariden, Daint): 4 GH200 a node, 288 cores, aarch64. Written from docs.cscs.ch of 2026-08-20 (LLM
# fine-tuning tutorial, Container Engine, NCCL); not run there.
# The container is one of the Container Engine: ~/.edf/stepladder.toml, which docs/slurm.md shows.
: "${STEPLADDER_SRUN=--environment=stepladder}"
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH}"
# NCCL then ends where the plugin is missing, and does not fall back to TCP (NCCL page).
: "${NCCL_NET=AWS Libfabric}"
