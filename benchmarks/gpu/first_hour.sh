#!/usr/bin/env bash
# The first hour on a card, in commands of at most ten minutes: every step is a command of its own. In a checkout:
#
#   benchmarks/gpu/first_hour.sh pack [3.12]    with a network: wheels for that Python, to be brought along
#   benchmarks/gpu/first_hour.sh [STEP...]      on the card, until it says that 0 steps are left
#   benchmarks/gpu/first_hour.sh all            these steps, then all others
#   benchmarks/gpu/first_hour.sh --list [all]   the commands with their limits, the most valuable first
#   benchmarks/gpu/first_hour.sh --dry-run      all of it without a card: tiny sizes, interpreted kernels
#
# STEP may be a pattern such as 'rivals-*'. BACKEND is nvidia unless set. PYTHON has torch; with INSTALLED=1 it has
# all that is needed, and no wheels are. A command ends within LIMIT seconds. AGAIN='STEP...' repeats what is
# done, SMOKE=1 takes tiny sizes. All is in WORK (build/first_hour), and what is to be taken away in OUT, too.
#
# Exit codes: 0 nothing is wrong, 1 packing failed, 2 usage, 3 a step failed, 4 a wrong result, 130 interrupted, 143
# ended by SIGTERM, 129 by SIGHUP.
set -euo pipefail

die() { echo "error: $*" >&2 && exit 2; }
self=$(realpath "${BASH_SOURCE[0]}")
here=${self%/*} checkout=${self%/benchmarks/gpu/*} limit=${LIMIT:-600} backend=${BACKEND:-nvidia} smoke=${SMOKE:-}
[[ $limit =~ ^[1-9][0-9]{2,4}$ && $limit -ge 240 ]] || die "LIMIT must be 240 to 99999 seconds, got '$limit'."
python=$(command -v "${PYTHON:-python}") || die "there is no '${PYTHON:-python}': set PYTHON."
python=$(realpath -s "$python")
work=$(realpath -m "${WORK:-$checkout/build/first_hour}")
out=$(realpath -m "${OUT:-$work}") wheels=$work/wheels venv=$work/venv
cd "$checkout"

brought=( # what an image with torch may lack; FlashInfer 0.7 is too large
    msgspec safetensors click pluggy rich markdown-it-py mdurl pygments numpy nvidia-ml-py ninja einops filelock
    packaging tabulate tqdm requests urllib3 idna certifi charset-normalizer pytest iniconfig
    hypothesis sortedcontainers
    sgl-flash-mla==1.0.0 flashinfer-python==0.6.18 'apache-tvm-ffi<0.2'
)

sources() { # a sum over all that goes into the wheels; there may be no git
    find mla {backends,plugins/nvidia}/mla_* pyproject.toml {backends,plugins/nvidia}/pyproject.toml \
        -name __pycache__ -prune -o -type f -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | cat - <(echo "${brought[@]}") | sha256sum
}

pack() {
    rm -rf "$wheels" && mkdir -p "$wheels"
    env -u PIP_CONSTRAINT "$python" -m pip wheel -q --no-deps -w "$wheels" . ./backends ./plugins/nvidia
    env -u PIP_CONSTRAINT "$python" -m pip download -q --no-deps --only-binary :all: --implementation cp \
        --python-version "${1:-3.12}" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
        -d "$wheels" pip "${brought[@]}"
    sources >"$wheels/sources"
    local bytes=$(($(cat "$wheels"/* | wc -c) + $(git ls-files -z | xargs -0 cat | wc -c)))
    echo "$wheels and the tracked files: $((bytes >> 20)) of 64 MiB"
    [ $bytes -le $((64 << 20)) ] || die "that is too large to be brought along."
}

install() { # into an environment that sees what is around PYTHON, even if that is in one, and replaces nothing
    if [ -n "${INSTALLED:-}" ]; then export PYTHON=$python && return; fi
    [ "$(sources)" = "$(cat "$wheels/sources" 2>/dev/null)" ] ||
        die "$wheels is not of this checkout: run 'first_hour.sh pack'."
    export PYTHON=$venv/bin/python PATH=$venv/bin:$PATH
    if cmp -s "$wheels/sources" "$venv/sources"; then return; fi
    rm -rf "$venv" && "$python" -m venv --without-pip "$venv"
    "$python" -c 'import sys
for path in sys.path:
    if "-packages" in path: print(f"import site; site.addsitedir({path!a})")' \
        >"$(echo "$venv"/lib/python3*/site-packages)/around.pth"
    local pip=(env PIP_CONFIG_FILE=/dev/null "$PYTHON" "$(echo "$wheels"/pip-*.whl)/pip" --isolated
        install -q --no-deps --no-index -f "$wheels") # without the constraints of an image
    "${pip[@]}" --ignore-installed mla-bench mla-backends mla-backend-nvidia
    "${pip[@]}" "${brought[@]}" || die "the wheels do not fit $python: run 'first_hour.sh pack VERSION'."
    cp "$wheels/sources" "$venv"
}

# ------------------------------------------------------------------------------------------------ the steps

r1=(--config deepseek-r1) lite=() layer=() counts=() tiny=()
many=(--runs 20 --passes 6 --clock host) turns=(--runs 10 --passes 6 --cache warm)
heads=(16 64 128) large=(16 128) shapes=("32 64k 150" "128 16k 150" "128 64k 300") # batch, history, seconds
grid=(-a batch=1,8,32,128 -a 'kv=1k..64k*4') small=(-a batch=1,8 -a kv=1k,16k,64k)
prompts=(-a batch=1,8 -a q_len=512,4k -a kv=0,4k) selecting=(-a batch=1,16 -a "kv=8k..128k*4") steps=(-a batch=1,32,128 -a 'kv=1k..64k*4')
if [ -n "$smoke" ]; then
    r1=(--config "$here/smoke.json") counts=(--runs 2 --passes 2 --warmups 1) tiny=(--smoke)
    lite=("${r1[@]}") layer=(-a batch=2 -a kv=40) many=("${counts[@]}" --clock host)
    turns=("${counts[@]}" --cache warm) heads=(4) large=(4) shapes=("3 64 150")
    grid=(-a batch=1,2 -a kv=64) small=("${grid[@]}") prompts=(-a batch=2 -a q_len=8 -a kv=0) steps=("${grid[@]}")
    selecting=("${grid[@]}")
fi
own='mla[latent_attention=triton_latent,expanded_attention=triton_expanded]'

bench() { kind=bench step "$1" "$2" -m mla.bench --backend "$backend" "${@:3}"; }

rivals() { # NAME SECONDS OP WORDS...: every kernel of an op that runs here, in turns
    optional=1 tuned=1 bench "$1" "$2" --op "$3" --implementations "mla[$3=*]" "${@:4}"
}

large_rivals() { # SUFFIX SHAPE...: the shapes that targets are judged on, whose keys are up to 10 GB
    local suffix=$1 h shape batch history seconds
    for h in "${large[@]}"; do
        for shape in "${@:2}"; do
            read -r batch history seconds <<<"$shape"
            rivals "rivals-$h-${batch}x$history$suffix" "$seconds" latent_attention --heads "$h" \
                "${r1[@]}" -a "batch=$batch" -a "kv=$history" "${turns[@]}"
        done
    done
}

conformance() { # NAME SECONDS DTYPE WORDS...: the contract. A drawn case is compiled anew: only full parts draw a few
    local only=("${@:4}")
    [ -z "$smoke" ] || only=(--quick --only device)
    optional=1 step "$1" "$2" -m mla.conformance --backend "$backend" --draws "${draws:-0}" --dtype "$3" \
        "${only[@]}" --report "{out}.json" # a dtype that the backend does not claim is no failure
}
pointwise=(--only rms_norm --only rotate_query --only write_latent)
sparse=(--only write_index_key --only select_latents --only sparse_latent_attention)
rest=(--only device --only ops --only linear --only batched_linear --only expanded --only layer)

ask() { # SECONDS QUESTION...: open questions about the device
    local name
    for name in "${@:2}"; do optional=1 step "ask-$name" "$1" "$here/ask.py" "$name" --backend "$backend"; done
}

first_hour() {
    # Compiled first, so that no later limit has to hold that: libraries and Triton keep it on disk.
    optional=1 kind=sweep step compile-tiles 180 "$here/tune.py" compile "${tiny[@]}"
    optional=1 step compile-ops 240 -m mla.conformance --backend "$backend" --draws 0 --only ops.preflight
    step facts 120 -m mla.bench ceilings --backend "$backend" -o "{out}.json"
    large_rivals '' "${shapes[0]}"
    optional=1 tuned=1 bench own-deepseek-v2-lite 150 "${lite[@]}" --implementations "$own" --cache warm \
        "${counts[@]}" "${layer[@]}"
    optional=1 tuned=1 bench own-deepseek-r1 150 "${r1[@]}" --scenario decode --implementations "$own" \
        --cache warm "${counts[@]}" "${layer[@]}"
    conformance conformance-latent 230 bfloat16 --quick --only latent
    local class
    for class in latent-16 latent-64 latent-128 expanded-64 expanded-128; do
        optional=1 kind=sweep step "tune-$class" 110 "$here/tune.py" sweep "$class" --backend "$backend" \
            "${tiny[@]}" --out "{out}.json"
    done
    optional=1 always=1 step tune-choose 45 "$here/tune.py" choose --backend "$backend" "${tiny[@]}" \
        --sweeps results --out results/tuning
    large_rivals -tuned "${shapes[0]}"
    bench profile 120 "${lite[@]}" --implementations mla --mode eager --cache warm --clock host \
        --profile "{out}.trace.json.gz" "${counts[@]}" "${layer[@]}"
}

others() {
    local h
    step doctor 360 -m mla.bench doctor "$backend"
    step ops 210 -m mla.bench --backend "$backend" --list-ops "${lite[@]}"
    step ops-deepseek-r1 150 -m mla.bench --backend "$backend" --list-ops "${r1[@]}"
    bench standard-deepseek-v2-lite 240 "${lite[@]}" "${counts[@]}" # eager and in a graph, on both clocks
    bench standard-deepseek-r1 360 "${r1[@]}" "${counts[@]}"
    conformance conformance-pointwise 190 bfloat16 --quick "${pointwise[@]}"
    conformance conformance-rest 180 bfloat16 --quick "${rest[@]}"
    conformance conformance-sparse 230 bfloat16 --quick "${sparse[@]}"
    for h in "${heads[@]}"; do # absorbed attention alone; what does not fit into memory is skipped
        bench "grid-$h" 200 --op latent_attention --implementations mla "${r1[@]}" "${grid[@]}" -a "heads=$h" \
            "${many[@]}"
    done
    large_rivals '' "${shapes[@]:1}"
    for h in "${heads[@]}"; do
        rivals "rivals-$h" 140 latent_attention --heads "$h" "${r1[@]}" "${small[@]}" "${turns[@]}"
    done
    for h in "${large[@]}"; do
        rivals "rivals-expanded-$h" 90 expanded_attention --heads "$h" "${r1[@]}" "${prompts[@]}" "${turns[@]}"
    done
    for h in select_latents sparse_latent_attention; do # of 64 heads of an indexer, and 128 of attention
        rivals "rivals-$h" 240 "$h" --config deepseek-v3.2 "${selecting[@]}" "${turns[@]}"
    done
    bench sparse-layer 300 --preset sparse-layer --scenario decode --implementations mla "${selecting[@]}" "${counts[@]}"
    optional=1 tuned=1 bench choices 600 --scenario decode --clock host "${lite[@]}" "${counts[@]}" \
        --implementations 'mla,mla[latent_attention=*],mla[latent_attention=reference]' # inside the layer
    bench long-prefill 300 "${r1[@]}" --workload "$here/long_prefill.toml" --implementations mla --mode eager \
        --cache warm --clock host ${smoke:+--scenario new-1024-after-4096} "${counts[@]}"
    ask 60 event-gap copies-alive l2-flush
    bench layers 600 --scenario decode --implementations mla "${steps[@]}" "${r1[@]}" "${many[@]}"
    draws=12 conformance conformance-full-latent 300 bfloat16 --quick --only latent
    draws=12 conformance conformance-full-pointwise 160 bfloat16 --quick "${pointwise[@]}"
    draws=12 conformance conformance-full-rest 140 bfloat16 --quick "${rest[@]}"
    draws=12 conformance conformance-full-sparse 300 bfloat16 --quick "${sparse[@]}"
    local dtype
    for dtype in float16 float32; do
        conformance "conformance-$dtype-latent" 230 "$dtype" --quick --only latent
        conformance "conformance-$dtype-pointwise" 190 "$dtype" --quick "${pointwise[@]}"
        conformance "conformance-$dtype-rest" 180 "$dtype" --quick "${rest[@]}"
        conformance "conformance-$dtype-sparse" 230 "$dtype" --quick "${sparse[@]}"
    done
}

plan() { # MODE: calls `step` for every command
    mode=$1
    first_hour
    if [ -n "$all" ]; then others; fi
}

# ------------------------------------------------------------------------------------------- carrying them out

# results/steps.tsv has a line per step that was started; the last one counts:
# name, verdict, state (done: kept; cut: goes on; failed, open: tried again), code, seconds, limit, what it said.
record() { (IFS=$'\t' && echo "$*") >>results/steps.tsv; }
last() { awk -F'\t' -v name="$1" '$1 == name { end = $2 " " $3 } END { print end }' results/steps.tsv; }

matches() { # NAME PATTERN...: whether a step is one of these
    local pattern
    # shellcheck disable=SC2053  # a pattern
    for pattern in "${@:2}"; do [[ $1 != $pattern ]] || return 0; done
    return 1
}
wanted() { [ ${#names[@]} -eq 0 ] || matches "$1" "${names[@]}"; } # NAME: whether this command is to run a step

step() { # NAME SECONDS WORDS...: one command of PYTHON; {out} stands for its result without a suffix
    every+=("$1")
    case $mode in
        list) ! wanted "$1" || shown "$@" ;;
        left) case $(last "$1") in '' | *' ' | *' cut') left+=("$1") ;; esac ;;
        run) ! wanted "$1" || carry_out "$@" ;;
    esac
}

shown() { # NAME SECONDS WORDS...: print a command
    local words=("${@:3}")
    if [ "${kind:-}" = bench ]; then words+=(-o "{out}.json"); fi
    printf '# %s\ntimeout -k 20 %s python%s\n' "$1" "$2" "$(printf ' %q' "${words[@]//\{out\}/results/$1}")"
}

carry_out() {
    local name=$1 seconds=$2 result=results/$1 began=$SECONDS words code=0 verdict state said
    local tuning=/dev/null option file
    [ -z "$ended" ] || return 0
    if [ -z "${always:-}" ] && [[ $(last "$name") = *' done' ]]; then
        if [ "$(last "$name")" = 'wrong done' ]; then status=4; fi
        echo "$name: kept" >&2 && return
    fi
    [ $((end - SECONDS)) -ge 5 ] || return 0
    [ $((end - SECONDS)) -ge "$seconds" ] || seconds=$((end - SECONDS))
    words=("${@:3}") && words=("${words[@]//\{out\}/$result}")
    for file in results/tuning/*.json; do
        [ -z "${tuned:-}" ] || [ -z "$reads" ] || [ ! -e "$file" ] || { tuning=$file && words+=(-O "tuning=$file"); }
    done
    case ${kind:-} in bench | sweep) words+=(--budget "$((seconds * 9 / 10))s") ;; esac
    if [ "${kind:-}" = bench ]; then
        option=-o # a result of another tuning is another run
        if [ -e "$result.json" ] && cmp -s "$tuning" "$result.tuning"; then option=--resume; fi
        words+=("$option" "$result.json") && cat "$tuning" >"$result.tuning"
    fi
    touch "$result.began"
    timeout -k 20 "$seconds" "$PYTHON" "${words[@]}" >"$result.out" 2>"$result.log" </dev/null &
    child=$!
    echo "$name: at most $seconds s" >&2
    [ -z "$ended" ] || kill "$child" 2>/dev/null || true # a signal that came before there was a child
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do code=0 && wait "$child" || code=$?; done # a trap has ended the first
    kill -KILL -- "-$child" 2>/dev/null || true # what it has left running: timeout leads a group
    judge "$2"
    said=$(grep -ah '^error: ' "$result.log" "$result.out" | tail -n1 || true)
    if [ "$verdict" = ok ] || [ -z "$said" ]; then said=$(cat "$result.log" "$result.out" | grep -a . | tail -n1 || true); fi
    said=$(echo "${said#error: }" | tr -d '\r' | tr '\t' ' ' | cut -c -300)
    record "$name" "$verdict" "$state" "$code" $((SECONDS - began)) "$seconds" "$said"
    echo "$name: $verdict ($((SECONDS - began)) s): $said" >&2
}

judge() { # LIMIT: from `code` to `verdict` and `state`
    case $code in
        0) verdict=ok state=done ;;
        4) verdict=wrong state=done status=4 ;;
        2 | 3 | 5) verdict=refused state=failed ;;
        6) verdict=doubtful state=${smoke:+done} ;; # tiny sizes have no times to miss
        124 | 137) verdict='timed out' state=failed ;;
        *) verdict=crashed state=failed ;;
    esac
    if [ "$code" = 3 ] && [ "$result.json" -nt "$result.began" ]; then verdict=crashed; fi # an op raised
    if [ "$verdict" = refused ] && [ -n "${optional:-}" ]; then state=open; fi
    if grep -qsE -e '--budget (skipped|cut short)' "$result.log"; then state=cut; fi
    if [ "$verdict" = 'timed out' ] && [ "$seconds" -lt "$1" ]; then state=cut; fi
    if [ -n "$ended" ]; then verdict=interrupted state=cut; fi
    if [ "${state:=failed}" = failed ] && [ $status = 0 ]; then status=3; fi
}

finish() { # whatever ended the steps: the table, the archive, and what is left
    local code=$? file
    set +e # the terminal may be gone
    trap - EXIT
    left=() && plan left
    local count="${#left[@]} steps are"
    [ ${#left[@]} != 1 ] || count="1 step is"
    echo "$count left$(printf ', %s' "${left[@]}" | sed 's/^,/:/; s/^: $//')" >results/left
    mkdir -p "$out"
    timeout 40 "$PYTHON" "$here/table.py" results >table.part && mv table.part results/table.md ||
        echo "table.py failed; the results are in the archive" >&2
    tar czf results.part results && mv results.part results.tgz
    for file in results.tgz results/table.md; do
        [ ! -e $file ] || [ $file -ef "$out/${file#*/}" ] || cp $file "$out"
    done
    [ ! -e results/table.md ] || sed '/^## Kernels in turns/,$d' results/table.md
    cat results/left >&2
    echo "what is to be taken away is in $out" >&2
    exit "${ended:-$((status ? status : code))}"
}

no_card() { # CODE: say why the backend cannot be used
    local said
    said=$(grep -a . card.log | tail -n1 || true)
    case $1:$said in
        *:mla_backends.errors.UnknownBackend:*) die "${said#*: }" ;;
        124:*) said='it did not answer within 120 s' ;;
        *:) said="exit code $1" ;;
    esac
    echo "error: backend '$backend' is not usable here: ${said#mla_backends.errors.*: }" >&2 && exit 3
}

ends() { # CODE: a signal ends this command
    ended=$1
    kill "$child" 2>/dev/null || true
}

go_on() {
    local name card
    mkdir -p "$work" && cd "$work"
    export TRITON_CACHE_DIR=$work/cache/triton FLASHINFER_WORKSPACE_BASE=$work/cache
    if [ ! -d results ] && [ -f results.tgz ]; then # of another machine, whose caches are not here
        tar xzf results.tgz && again+=(compile-tiles compile-ops)
    fi
    end=$((limit - 90)) # a step may take 20 s to be ended; the rest is for tables and the archive
    [ $((end - SECONDS)) -gt 0 ] || die "no time is left after $SECONDS s of setting up: run it again, or raise LIMIT."
    card=$(timeout 120 "$PYTHON" -c 'import sys, mla
backend = mla.load_backend(sys.argv[1])
print("tuning" * ("tuning" in backend.known_options()), backend.device_info().name)' "$backend" 2>card.log) || no_card $?
    reads=${card%% *} card=${card#* } # whether it takes -O tuning=FILE
    card="$backend, $card${smoke:+ (tiny sizes, which say nothing about the card)}"
    mkdir -p results && touch results/steps.tsv
    [ ! -e results/card ] || [ "$card" = "$(cat results/card)" ] ||
        die "$work/results are of $(cat results/card); this is $card: set WORK."
    echo "$card" >results/card
    every=() && plan names
    for name in "${every[@]}"; do
        matches "$name" "${again[@]}" || continue
        record "$name" again '' '' 0 0 'to be repeated' && rm -f "results/$name".*
    done
    trap 'ends 129' HUP
    trap 'ends 130' INT
    trap 'ends 143' TERM
    trap finish EXIT
    plan run
}

dry_run() {
    export WORK=$work/dry OUT=$work/dry/out BACKEND=interpreted:mla_backend SMOKE=1 TRITON_INTERPRET=1
    export PYTHONPATH=$PWD/tests/triton
    rm -rf "$WORK"
    "$self" pack "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    timeout "$limit" "$self" compile-ops facts
    for _ in {1..6}; do
        rm -r "$WORK/results" && cp "$OUT/results.tgz" "$WORK" # as on another machine
        timeout "$limit" "$self"
        if grep -q '^0 steps are left$' "$OUT/table.md"; then
            echo "the dry run ended well, after $SECONDS s" >&2
            return
        fi
    done
    die "after 6 commands, $(grep -E '^[0-9]+ steps? (is|are) left' "$OUT/table.md")."
}

names=() every=() left=() all='' ended='' status=0 child='' reads='' mode=names
case ${1:-} in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self" && exit ;;
    pack) pack "${@:2}"; exit ;;
    --dry-run) dry_run; exit ;;
    --list) mode=list && shift ;;
    -*) die "there is no option '$1': --help shows all." ;;
esac
listing=$mode
if [ "${1:-}" = all ]; then all=1 && shift; fi
known() { # PATTERN: whether the plan has such a step
    local name
    every=() && plan names
    for name in "${every[@]}"; do ! matches "$name" "$1" || return 0; done
    return 1
}
for name in "$@"; do
    known "$name" || { all=1 && known "$name"; } || die "there is no step '$name': --list all shows them."
done
read -ra again <<<"${AGAIN:-}"
for name in "${again[@]}"; do known "$name" || die "AGAIN: this command has no step '$name'."; done
names=("$@")
if [ "$listing" = list ]; then plan list && exit; fi
install
go_on
