# shellcheck shell=bash disable=SC2034
# Perlmutter (NERSC): 4 A100 a node, 64 cores (128 threads), Slingshot. Written from NERSC's tutorial
# github.com/NERSC/dl-at-scale-training of 2025-02-26 (submit_pm.sh); not run there.
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH}"
: "${FI_MR_CACHE_MONITOR=userfaultfd}"
# The tutorial has srun start each rank, which sees all GPUs. The first cores are beside the last GPU: the tutorial
# turns the order of the GPUs around, this that of the cores.
[[ ${SLURM_GPUS_ON_NODE:-} != 4 ]] || : "${STEPLADDER_TASKS=rank}"
if [[ ${SLURM_GPUS_ON_NODE:-} == 4 && $STEPLADDER_TASKS == rank ]]; then
    : "${STEPLADDER_SRUN=--gpu-bind=none --cpu-bind=map_ldom:3,2,1,0}"
fi
