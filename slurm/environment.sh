# shellcheck shell=bash disable=SC2034,SC1091 # sourced; `inside` is used by those who source it; clusters differ
# The environment of a job, sourced by every template here, on each node. Set what your cluster needs, in your
# shell before sbatch or in this file:
#
#   STEPLADDER_MODULES="cuda/12.8 gcc/13"   module load …
#   STEPLADDER_VENV=/project/env            a virtual environment (default: .venv, where it exists)
#   STEPLADDER_CONDA=stepladder             a conda environment, instead
#   STEPLADDER_CONTAINER=/images/s.sif      an Apptainer image, instead: it must hold Stepladder's packages
#   STEPLADDER_SCRATCH=/scratch/$USER       caches go there, off the small or slow home folder
#
# Sets ${inside[@]}, the prefix of each command: empty, or the container's exec.
inside=()
if [[ ${STEPLADDER_MODULES:-} ]]; then
    # `module` is a shell function that a batch shell may not have.
    [[ $(type -t module) ]] || source /etc/profile.d/modules.sh 2>/dev/null || source /etc/profile.d/lmod.sh
    # shellcheck disable=SC2086 # several modules are several words
    module load $STEPLADDER_MODULES
fi
if [[ ${STEPLADDER_CONTAINER:-} ]]; then
    # --nv brings the GPU driver in; the working folder and /tmp are there by default, other disks by APPTAINER_BIND.
    inside=(apptainer exec --nv --pwd "$PWD" "$STEPLADDER_CONTAINER")
elif [[ ${STEPLADDER_CONDA:-} ]]; then
    # conda's hooks read variables that may be unset.
    set +u
    source "$(conda info --base)/etc/profile.d/conda.sh"
    conda activate "$STEPLADDER_CONDA"
    set -u
elif [[ -f ${STEPLADDER_VENV:=.venv}/bin/activate ]]; then
    source "$STEPLADDER_VENV/bin/activate"
fi
if [[ ${STEPLADDER_SCRATCH:-} ]]; then
    export HF_HOME=${HF_HOME:-$STEPLADDER_SCRATCH/huggingface}
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$STEPLADDER_SCRATCH/cache}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$STEPLADDER_SCRATCH/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$STEPLADDER_SCRATCH/triton}
fi
# Compute nodes rarely reach the hub: fetch on the login node (docs/slurm.md), and do not wait for time-outs here.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# `python scripts/x.py` finds Stepladder in this folder, whatever is installed elsewhere.
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# The tokenizer's threads: by default one per core of the node, even if the job has fewer.
[[ ! ${SLURM_CPUS_ON_NODE:-} ]] || export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$SLURM_CPUS_ON_NODE}
