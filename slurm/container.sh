# shellcheck shell=bash disable=SC2034,SC2154,SC2016 # a part of environment.sh; bash expands $0 and $@ in the container
# Commands inside a container: of Apptainer or Singularity by STEPLADDER_CONTAINER, or of srun itself (Pyxis, CSCS).
# What stands before a command inside: $0 is an environment on top of the image, whose python is a link into it, or empty;
# $1 is the folder. Apptainer forgets that USR1 is ignored, and passes on to its child, which is this shell, what Slurm
# has sent to all processes already: torchrun must not get TERM twice.
within='cd "$1" || exit; shift; [[ ! $0 ]] || source "$0/bin/activate"; trap "" USR1; trap : TERM; "$@"; exit $?'
if [[ $contained == image ]]; then
    [[ -e $STEPLADDER_CONTAINER ]] ||
        fail "STEPLADDER_CONTAINER=$STEPLADDER_CONTAINER is not there" "an image or a sandbox folder (docs/slurm.md)"
    tool=$(type -P apptainer || type -P singularity) ||
        fail "STEPLADDER_CONTAINER, and neither apptainer nor singularity here" "STEPLADDER_MODULES=apptainer"
    options=()
    [[ ! -e /dev/nvidiactl ]] || options+=(--nv)
    [[ ! -e /dev/kfd ]] || options+=(--rocm)
    # What the node has and an image has not: every folder under / but the system's own; then folders that may lie there.
    for folder in /* "$PWD" "${SLURM_TMPDIR:-}" "${TMPDIR:-}" "${HF_HOME:-}" "${STEPLADDER_SCRATCH:-}" \
        "${STEPLADDER_VENV:-}" "${STEPLADDER_STAGE:-}" "${STEPLADDER_FOLDER:-}"; do
        [[ $folder =~ ^/(bin|boot|dev|etc|lib.*|lost\+found|opt|proc|root|run|sbin|srv|sys|tmp|usr|var)$ ]] && continue
        [[ $folder == /* && -d $folder && -r $folder && -x $folder && " ${options[*]} " != *" --bind $folder "* ]] || continue
        [[ $folder != *[:,]* ]] || fail "$folder cannot be bound into a container" "a path without a colon or comma"
        options+=(--bind "$folder")
    done
    # What lies in ~/.local would come before the image's packages.
    export PYTHONNOUSERSITE=${PYTHONNOUSERSITE:-1}
    inside=("$tool" exec "${options[@]}" "$STEPLADDER_CONTAINER" bash -c "$within" "${STEPLADDER_VENV:-}" "$PWD")
elif [[ $contained == later && ${SLURM_JOB_ID:-} ]]; then
    # The ranks' container begins with srun: the batch script's own commands are steps of one task in it.
    inside=(srun --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${srun_words[@]}"
        bash -c "$within" "${STEPLADDER_VENV:-}" "$PWD")
fi
