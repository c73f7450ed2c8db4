#!/usr/bin/env bash
# The first hour on a card without a network, in commands of at most ten minutes. In a checkout:
#
#   benchmarks/gpu/first_hour.sh pack [3.12]    with a network: wheels for that Python, to be brought along
#   benchmarks/gpu/first_hour.sh [STEP...]      on the card, until it says that 0 steps are left
#   benchmarks/gpu/first_hour.sh --list         its commands with their limits, the most valuable first
#   benchmarks/gpu/first_hour.sh --dry-run      all of it without a card: tiny sizes, interpreted kernels
#
# PYTHON has torch. All is in build/first_hour, and what is to be taken away in $OUT, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

limit=${LIMIT:-600} backend=${BACKEND:-nvidia} work=${WORK:-$PWD/build/first_hour}
self=$PWD/benchmarks/gpu/first_hour.sh wheels=$work/wheels venv=$work/venv results=$work/results out=${OUT:-$work}
brought=( # what an image with torch may lack; FlashInfer 0.7 is too large
    msgspec safetensors click pluggy rich markdown-it-py mdurl pygments numpy nvidia-ml-py ninja einops filelock
    packaging tabulate tqdm requests urllib3 idna certifi charset-normalizer
    sgl-flash-mla==1.0.0 flashinfer-python==0.6.18 'apache-tvm-ffi<0.2'
)
die() { echo "error: $*" >&2 && exit 2; }
python=$(command -v "${PYTHON:-python}") || die "there is no '${PYTHON:-python}': set PYTHON."
sources() { find mla backends plugins/nvidia -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum; }
left() { grep -cE 'the budget is used up|did not fit into' "$1/table.md" || true; }

pack() {
    rm -rf "$wheels" && mkdir -p "$wheels"
    "$python" -m pip wheel -q --no-deps -w "$wheels" . ./backends ./plugins/nvidia
    "$python" -m pip download -q --no-deps --only-binary :all: --implementation cp --python-version "${1:-3.12}" \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -d "$wheels" pip "${brought[@]}"
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
    local pip=("$venv/bin/python" "$(echo "$wheels"/pip-*.whl)/pip" install -q --no-deps --no-index -f "$wheels")
    "$python" -c 'import sys; print(*(path for path in sys.path if "-packages" in path), sep="\n")' \
        >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/around.pth"
    "${pip[@]}" --ignore-installed mla mla-backends mla-backend-nvidia
    "${pip[@]}" "${brought[@]}" || die "the wheels do not fit $python: run 'first_hour.sh pack VERSION'."
    cp "$wheels/sources" "$venv"
}

campaign() { "${self%/*}/campaign.sh" --short --backend "$backend" ${SMOKE:+--smoke} "$@"; }

go_on() {
    local words=() code=0 cores
    cores=$(nproc)
    cd "$work"
    export TRITON_CACHE_DIR=$work/cache/triton FLASHINFER_WORKSPACE_BASE=$work/cache
    if [ $# -gt 0 ]; then words=(--only "$(IFS=, && echo "$*")"); fi
    if [ ! -d "$results" ] && [ -f "$work/first_hour.tgz" ]; then # of another machine, whose caches are not here
        tar xzf "$work/first_hour.tgz" -C "$work" && words+=(--again compile)
    fi
    if [ ! -e "$work/checks.log" ] && [ -z "${SMOKE:-}" ]; then # their results count in a step of their own
        python -m mla.conformance --list | grep -o '^latent\.[a-z_]*' |
            timeout 150 xargs -P $((cores < 16 ? cores : 16)) -n 1 python -m mla.conformance --backend "$backend" \
                --quick --dtype bfloat16 --only >"$work/checks.log" 2>&1 || true
    fi
    campaign --out "$results" --budget "$((limit - SECONDS - 60))s" "${words[@]}" || code=$?
    [ -e "$results/table.md" ] || exit "$code"
    mkdir -p "$out" && cp -u "$results/table.md" "$out"
    tar czf "$out/first_hour.tgz" -C "$work" --exclude '*.gz' results
    find "$results" -name '*.gz' -print0 | tar czf "$out/traces.tgz" -P --transform 's|.*/||' --null -T -
    echo "$(left "$out") steps are left, after $SECONDS s; results: $out" >&2
    exit "$code"
}

dry_run() {
    export WORK=$work/dry OUT=$work/dry/out BACKEND=interpreted:mla_backend SMOKE=1 TRITON_INTERPRET=1
    export PYTHONPATH=$PWD/tests/triton
    rm -rf "$WORK"
    "$self" pack "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    BACKEND=nvidia SMOKE='' "$self" --list
    timeout "$limit" "$self" compile facts
    while
        rm -r "$WORK/results" && cp "$OUT/first_hour.tgz" "$WORK" # as on another machine
        timeout "$limit" "$self" || exit
        [ "$(left "$OUT")" -gt 0 ]
    do :; done
    tar tzf "$OUT/traces.tgz" && echo "the dry run ended well, after $SECONDS s" >&2
}

case ${1:-} in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self" ;;
    pack) pack "${@:2}" ;;
    --dry-run) dry_run ;;
    --list) install; campaign --dry-run ;;
    -*) die "there is no option '$1': --help shows all." ;;
    *) install; go_on "$@" ;;
esac
