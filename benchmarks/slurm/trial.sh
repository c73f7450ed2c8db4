#!/usr/bin/env bash
# Run the runner under srun and sbatch and check what it does: one line per claim of the README.
# Needs a Slurm node with 2 CPUs or more (single_node.sh makes one) and, as `python`, one that has mla.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d) && cd "$folder" || exit 2
trap 'rm -rf "$folder"' EXIT
failed=0

cat >tiny.json <<'END'
{"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32,
 "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
END
cat >tiny.toml <<'END'
[[scenario]]
name = "decode"
mode = "decode"
query_lens = ["1*2"]
history = [5, 9]
runs = 4
warmups = 1
END
small="--config tiny.json --workload tiny.toml"
bench="python -m mla.bench --backend cpu $small"
endless="--passes 10000000"

check() { # WHAT CONDITION...: a command whose exit status says whether it holds
    local what=$1
    shift
    if "$@"; then echo "ok      $what"; else
        echo "FAILED  $what"
        failed=1
    fi
}
code() { # EXPECTED COMMAND...: run quietly; keep stdout and stderr
    local expected=$1 got
    shift
    timeout 180 "$@" >out.txt 2>err.txt
    got=$?
    [ "$got" = "$expected" ] || { echo "        exit code $got, not $expected: $*"; tail -3 err.txt; false; }
}
fact() { # FILE KEY VALUE: an entry of the environment report
    python - "$@" <<'END'
import json, sys
found = json.load(open(sys.argv[1]))["environment"].get(sys.argv[2])
sys.exit(found != sys.argv[3] and f"        {sys.argv[2]} is {found}")
END
}
two_ranks() { # FILE: every case has the samples of both ranks
    python -c "import json, sys; sys.exit(any(len(one['spread']['ranks']) != 2 for one in json.load(open(sys.argv[1]))['cases']))" "$1"
}
interrupted() { # FILE: complete JSON, and cut short
    python -c "import json, sys; sys.exit(not json.load(open(sys.argv[1]))['cases'][-1]['interrupted'])" "$1"
}
started() { # FILE: wait until a task has said what it is about to measure, then let it time a little
    for _ in $(seq 600); do
        grep -qs '^memory' "$1" && sleep 10 && return
        sleep 0.1
    done
    return 1
}
state() { # JOB FIELD: what Slurm says about a job that has ended
    scontrol show job "$1" | sed -n "s/.*\<$2=\([^ ]*\).*/\1/p" | head -1
}
gone() { # JOB: wait for its end
    while [ -n "$(squeue -h -j "$1" 2>/dev/null)" ]; do sleep 0.5; done
}

srun --version
check "srun -n 1" code 0 srun -n 1 $bench -o one.json
check "the result names the job" fact one.json slurm_ntasks 1
check "srun -n 2, a file for each task" code 0 \
    srun -n 2 --cpus-per-task=1 --output=log-%t.txt $bench -o run-%t.json
check "task 0" fact run-0.json slurm_procid 0
check "task 1" fact run-1.json slurm_procid 1
check "one thread for each task" fact run-1.json backend.threads 1
echo "        decided by $(python -c "import json; print(json.load(open('run-1.json'))['environment']['backend.threads_from'])")"
check "stdout of task 1 in a file of its own" grep -q "Decode Throughput" log-1.txt
check "two tasks and one file are refused" code 2 srun -n 2 $bench -o run.json
check "... in a sentence" grep -q "2 tasks would all write 'run.json'" err.txt
check "srun -n 2 --parallel tp=2, one result" code 0 \
    srun -n 2 --cpus-per-task=1 $bench --parallel tp=2 -o ranks.json
check "... of two ranks" two_ranks ranks.json
check "... told by rank 0 alone" test "$(grep -c '^rank 1: ' err.txt)" = 0
check "four ranks asked of two tasks are refused" code 2 srun -n 2 $bench --parallel tp=4
check "--cpus-per-task=2" code 0 srun -n 1 --cpus-per-task=2 $bench -o two.json
check "... gives two threads" fact two.json backend.threads 2
check "an unusable backend is exit code 3 of srun" code 3 srun -n 1 python -m mla.bench --backend metax
check "wrong usage is exit code 2 of srun" code 2 srun -n 1 python -m mla.bench --runs none

check "sbatch job.sbatch" code 0 sbatch --wait "$here/job.sbatch" $small
job=$(grep -o '[0-9]*$' out.txt)
check "... wrote task 0" fact "mla-$job-0.json" slurm_job_id "$job"
check "... wrote task 1" fact "mla-$job-1.json" slurm_procid 1

job=$(sbatch --parsable "$here/job.sbatch" $small $endless)
check "a job that is cancelled" started "mla-$job-0.err"
scancel "$job"
gone "$job"
check "... leaves a partial result of task 0" interrupted "mla-$job-0.json"
check "... and of task 1" interrupted "mla-$job-1.json"
check "... and says so" grep -q "interrupted by SIGTERM" "mla-$job-1.err"

# The least time limit is a minute, and Slurm sends the signal up to a minute early.
job=$(sbatch --parsable --time=0:02:00 --signal=TERM@60 "$here/job.sbatch" $small $endless)
check "a job that runs into --signal=TERM@60" started "mla-$job-0.err"
gone "$job"
check "... leaves a partial result" interrupted "mla-$job-1.json"
check "... and ends with 143 of its own accord" test "$(state "$job" JobState) $(state "$job" ExitCode)" = "FAILED 143:0"

cat >plain.sh <<END
#!/bin/bash
exec $bench $endless -o plain.json
END
job=$(sbatch --parsable --time=0:01:00 --output=plain.log plain.sh)
check "a script without srun that runs into its time limit" started plain.log
gone "$job"
check "... leaves a partial result before KillWait is over" interrupted plain.json
echo "        its state is $(state "$job" JobState), its exit code $(state "$job" ExitCode)"
exit $failed
