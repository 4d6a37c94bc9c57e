#!/usr/bin/env bash
# Check, train, merge (an adapter), compare: each job starts when the one before it has succeeded, else it is cancelled.
#
#     bash slurm/pipeline.sh --nodes=2 --gpus-per-node=4 --cpus-per-gpu=8 -- --recipe qlora --strategy zero3
#
# Before the --: sbatch's options for the training; after it: the recipe and its keys. A training that is
# preempted keeps its number when it is requeued, so the others keep waiting for it. Prints the jobs' numbers.
# The comparison is on the rows that the run holds out; a recipe that holds out none is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SLURM_SUBMIT_DIR=$PWD source slurm/environment.sh

options=()
while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
(($# > 1)) || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
shift
# The check runs here, on the login node: a mistake costs no time in the queue.
folder=$("${inside[@]}" python -m stepladder.cluster.job folder "$@")
base=$("${inside[@]}" python -m stepladder.cluster.job base "$@")
"${inside[@]}" python -m stepladder.cluster.job held_out "$@" >/dev/null
# The options that merge the adapter; none after full fine-tuning.
merge_it=()
eval "merge_it=($("${inside[@]}" python -m stepladder.cluster.job merge "$@"))"

# Otherwise a job whose predecessor failed would wait in the queue for ever.
after() { echo "--dependency=afterok:$1" --kill-on-invalid-dep=yes; }
train=$(sbatch --parsable --job-name=train "${options[@]}" slurm/sft.sbatch "$@")
tuned=$folder last=$train said="train $train"
if ((${#merge_it[@]})); then
    # shellcheck disable=SC2046 # two options
    last=$(sbatch --parsable --job-name=merge $(after "$train") slurm/script.sbatch merge "${merge_it[@]:2}")
    tuned=$folder/merged said+=" → merge $last"
fi
# shellcheck disable=SC2046
compare=$(sbatch --parsable --job-name=compare $(after "$last") slurm/script.sbatch compare --base "$base" --tuned "$tuned" --output_dir "$folder/compared")
echo "$said → compare $compare; follow: squeue --me; result: $folder/compared/report.html"
