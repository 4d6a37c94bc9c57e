# shellcheck shell=bash disable=SC2034,SC1090,SC1091 # sourced; those who source it use `inside`; clusters differ
# The environment of a job, sourced by every template here, on each node. Set what your cluster needs in your shell
# before sbatch, or in slurm/site.sh, which is yours and not committed:
#
#   STEPLADDER_SITE=lumi                    a file of slurm/sites/: what a centre documents for its machine
#   STEPLADDER_MODULES="cuda/12.8 gcc/13"   module load …; `purge` and `reset` are what they are, /a/folder is module use
#   STEPLADDER_VENV=/project/env            a virtual environment (default: .venv, where it exists)
#   STEPLADDER_CONDA=stepladder             a conda environment, instead
#   STEPLADDER_CONTAINER=/images/s.sif      an Apptainer image; with STEPLADDER_VENV, an environment on top of it
#   STEPLADDER_SCRATCH=/scratch/$USER       caches go there, off the small or slow home folder
#   STEPLADDER_STAGE=/scratch/stage         in place of the hub (stage.py); with STEPLADDER_STAGE_LOCAL=1 each
#                                           node copies it to $SLURM_TMPDIR
#   STEPLADDER_SRUN="--cpu-bind=cores"      srun's options for the ranks, quoted as in a shell
#   STEPLADDER_HEAD=%i                      how the nodes reach each other: % is a node's name; without %, the first's address
#   STEPLADDER_TASKS=rank                   srun starts each rank, where a centre wants no torchrun
#
# Sets ${inside[@]}, the prefix of each command, and ${srun_words[@]}.
fail() {
    printf '✘ launch: %s\n  help: %s\n' "$1" "$2" >&2
    exit 2
}

export USER=${USER:-$(id -un)} # which the sites name, and --export=NIL takes away
# Exported, so that all nodes have what the first one read. `: "${X=…}"` leaves a set X alone, also an empty one.
# A command in them that fails ends the job, and bash would not say which.
set -aE
trap 'fail "${BASH_SOURCE[0]}: line $LINENO ended with $?: $BASH_COMMAND" "|| true, also after a last line like [[ … ]] && …"' ERR
[[ ! -f slurm/site.sh ]] || source slurm/site.sh
if [[ ${STEPLADDER_SITE:-} ]]; then
    [[ $STEPLADDER_SITE != */* && -f slurm/sites/$STEPLADDER_SITE.sh ]] ||
        fail "STEPLADDER_SITE=$STEPLADDER_SITE: no such file in slurm/sites/" "$(cd slurm/sites && echo *.sh | sed 's/\.sh//g')"
    source "slurm/sites/$STEPLADDER_SITE.sh"
fi
trap - ERR
set +aE

inside=() srun_words=() contained=''
[[ ! ${STEPLADDER_CONTAINER:-} ]] || contained=image
if [[ ${STEPLADDER_SRUN:-} ]]; then
    split=$(xargs -r printf '%s\n' <<<"$STEPLADDER_SRUN" 2>/dev/null) ||
        fail "STEPLADDER_SRUN=$STEPLADDER_SRUN: a quote is not closed" "STEPLADDER_SRUN=\"--comment='two words' --cpu-bind=cores\""
    [[ ! $split ]] || mapfile -t srun_words <<<"$split"
fi
# A container that srun starts, Pyxis' or CSCS': this may be the batch script, outside, or a step, inside.
if [[ " ${srun_words[*]}" =~ \ --(container-(image|name)|environment|uenv) ]]; then
    contained=step
    [[ ${SLURM_STEP_ID:-} ]] || contained=later
fi
if [[ ${STEPLADDER_MODULES:-} ]]; then
    set +u # module's functions and conda's hooks read variables that may be unset
    # `module` is a shell function that a batch shell may not have.
    [[ $(type -t module) ]] || source /etc/profile.d/modules.sh 2>/dev/null || source /etc/profile.d/lmod.sh 2>/dev/null ||
        fail "STEPLADDER_MODULES=$STEPLADDER_MODULES, and there is no module command here" "in slurm/site.sh: set +u; source …; set -u"
    for name in $STEPLADDER_MODULES; do
        case $name in
            purge | reset) module "$name" ;;
            /*) module use "$name" ;;
            *) module load "$name" ;;
        esac
    done
    set -u
fi
if [[ ${STEPLADDER_CONDA:-} ]]; then
    [[ ! ${STEPLADDER_VENV:-}$contained ]] || fail "STEPLADDER_CONDA, and a venv or a container" "unset one of them"
    type conda &>/dev/null || fail "STEPLADDER_CONDA=$STEPLADDER_CONDA, and there is no conda here" "its module in STEPLADDER_MODULES"
    set +u
    source "$(conda info --base)/etc/profile.d/conda.sh"
    conda activate "$STEPLADDER_CONDA"
    set -u
elif [[ ${STEPLADDER_VENV:-} && $contained != later && ! -f $STEPLADDER_VENV/bin/activate ]]; then
    fail "STEPLADDER_VENV=$STEPLADDER_VENV has no bin/activate" "python -m venv $STEPLADDER_VENV"
elif [[ ${STEPLADDER_VENV:-} && (! $contained || $contained == step) ]]; then
    source "$STEPLADDER_VENV/bin/activate"
elif [[ ! $contained && -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi
if [[ ${STEPLADDER_SCRATCH:-} ]]; then
    export HF_HOME=${HF_HOME:-$STEPLADDER_SCRATCH/huggingface}
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$STEPLADDER_SCRATCH/cache}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$STEPLADDER_SCRATCH/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$STEPLADDER_SCRATCH/triton}
fi
# Compute nodes rarely reach the hub: fetch on the login node (docs/slurm.md), and do not wait for time-outs here.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# In a clone Python finds Stepladder in this folder, whatever is installed elsewhere.
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# The tokenizer's threads: by default one per core of the node, even if the job has fewer.
[[ ! ${SLURM_CPUS_ON_NODE:-} ]] || export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$SLURM_CPUS_ON_NODE}

source slurm/container.sh
