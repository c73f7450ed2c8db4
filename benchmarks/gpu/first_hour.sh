#!/usr/bin/env bash
# The first hour on a card without a network, in commands of at most ten minutes. In a checkout:
#
#   benchmarks/gpu/first_hour.sh pack [3.12]    with a network: wheels for that Python, to be brought along
#   benchmarks/gpu/first_hour.sh [STEP...]      on the card, until it says that 0 steps are left
#   benchmarks/gpu/first_hour.sh --list         its commands with their limits, the most valuable first
#   benchmarks/gpu/first_hour.sh --dry-run      all of it without a card: tiny sizes, interpreted kernels
#
# PYTHON has torch. All is in build/first_hour, and what is to be taken away in $OUT, too.
# A command ends within LIMIT seconds.
set -euo pipefail

die() { echo "error: $*" >&2 && exit 2; }
self=$(realpath "${BASH_SOURCE[0]}")
checkout=${self%/benchmarks/gpu/*} limit=${LIMIT:-600} backend=${BACKEND:-nvidia}
[[ $limit =~ ^[1-9][0-9]{2,4}$ && $limit -ge 240 ]] || die "LIMIT must be 240 to 99999 seconds, got '$limit'."
python=$(command -v "${PYTHON:-python}") || die "there is no '${PYTHON:-python}': set PYTHON."
python=$(realpath -s "$python")
work=$(realpath -m "${WORK:-$checkout/build/first_hour}")
out=$(realpath -m "${OUT:-$work}") wheels=$work/wheels venv=$work/venv
cd "$checkout"

brought=( # what an image with torch may lack; FlashInfer 0.7 is too large
    msgspec safetensors click pluggy rich markdown-it-py mdurl pygments numpy nvidia-ml-py ninja einops filelock
    packaging tabulate tqdm requests urllib3 idna certifi charset-normalizer pytest iniconfig
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

campaign=("${self%/*}/campaign.sh" --short --backend "$backend" ${SMOKE:+--smoke})

go_on() {
    local budget words=(--out "$work/results" --pack "$out")
    cd "$work"
    export TRITON_CACHE_DIR=$work/cache/triton FLASHINFER_WORKSPACE_BASE=$work/cache
    if [ $# -gt 0 ]; then words+=(--only "$(IFS=, && echo "$*")"); fi
    if [ ! -d results ] && [ -f results.tgz ]; then # of another machine, whose caches are not here
        tar xzf results.tgz && words+=(--again compile)
    fi
    budget=$((limit - SECONDS - 90)) # a step may take 25 s to be ended; the rest is for tables and the archive
    [ $budget -gt 0 ] || die "no time is left after $SECONDS s of setting up: run it again, or raise LIMIT."
    exec timeout --foreground -k 40 $((budget + 40)) "${campaign[@]}" "${words[@]}" --budget "${budget}s"
}

dry_run() {
    export WORK=$work/dry OUT=$work/dry/out BACKEND=interpreted:mla_backend SMOKE=1 TRITON_INTERPRET=1
    export PYTHONPATH=$PWD/tests/triton
    rm -rf "$WORK"
    "$self" pack "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    BACKEND=nvidia SMOKE='' "$self" --list
    timeout "$limit" "$self" compile facts
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

case ${1:-} in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self" ;;
    pack) pack "${@:2}" ;;
    --dry-run) dry_run ;;
    --list) install; "${campaign[@]}" --dry-run ;;
    -*) die "there is no option '$1': --help shows all." ;;
    *) install; go_on "$@" ;;
esac
