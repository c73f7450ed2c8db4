#!/usr/bin/env bash
# Settle on one card what only a card can tell. In a checkout, with mla and the card's plugin installed:
#
#   benchmarks/gpu/campaign.sh                    everything, two hours at most
#   benchmarks/gpu/campaign.sh --budget 30m       what fits into half an hour, the most valuable first
#   benchmarks/gpu/campaign.sh --dry-run          every command with its limit
#   benchmarks/gpu/campaign.sh --help
#
# PYTHON names the interpreter, else `python` of the active environment is used.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

command -v "$python" >/dev/null || {
    echo "error: there is no '$python': activate the environment that has mla, or set PYTHON." >&2
    exit 2
}
"$python" -c 'import mla.command, mla_backends' 2>/dev/null || {
    echo "error: '$python' has no mla: activate the environment that has it, or set PYTHON." >&2
    exit 2
}
export TOKENIZERS_PARALLELISM=false PYTHONFAULTHANDLER=1
exec "$python" "$here/campaign.py" "$@"
