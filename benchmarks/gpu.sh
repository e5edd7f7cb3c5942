#!/usr/bin/env bash
# Fills the empty cells on a machine with a GPU in under ten minutes: the tests that need CUDA, then the operators in order of importance,
# then whole training steps and how cost grows.
#
#   benchmarks/gpu.sh [WHEELS [ARCHIVE.tar.gz]]
#
# WHEELS   a folder of other packages' wheels; each is installed without what it depends on, into a temporary folder that only this
#          run sees. torch, triton and nvidia wheels are left out: they would replace the machine's own. "-" for none.
# ARCHIVE  kept up to date after every part, with the results, the log and a junit.xml: for machines that hand back few files.
#
# Environment: PYTHON (python3), SECONDS_IN_ALL (560), RESULTS (benchmarks/results),
#              PARTS ("tests", every operator of benchmarks/registry.py, "ladder", "scaling"; for a second run: PARTS="maxsim ladder").
# Every part has its own time limit and its results are written when it is done, so one that hangs takes nothing from the others.
# Exit code: 0 all parts done, 1 some failed or were skipped, 2 nothing could run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
wheels=${1:--}
archive=${2:-}
budget=${SECONDS_IN_ALL:-560}
results=${RESULTS:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/site" "$work/kept"
touch "$work/started"
case $archive in "" | /*) ;; *) archive=$PWD/$archive ;; esac
export PYTHONPATH="$PWD:$PWD/kernels:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FASTVLP_IMPL

log() { printf '%s\n' "$*" | tee -a "$work/kept/gpu.log"; }

keep() {
    [ -n "$archive" ] || return 0
    find "$results" -type f -newer "$work/started" 2>/dev/null | tar czf "$archive.part" -T - -C "$work/kept" . && mv "$archive.part" "$archive"
}

summary=()
bad=0
note() {
    summary+=("$1")
    log "== $1"
}

# part NAME SECONDS COMMAND...: runs the command under the limit and notes how it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    log "== $name: at most $limit s"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$work/kept/gpu.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) note "$name: done in $((SECONDS - start)) s" ;;
        124 | 137) note "$name: stopped after $limit s, its limit (or killed for memory)" && bad=1 ;;
        *) note "$name: failed with exit code $code after $((SECONDS - start)) s" && bad=1 ;;
    esac
    keep
}

timeout -k 5 120 "$python" - >"$work/kept/machine.txt" 2>&1 <<'PYTHON'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("PyTorch sees no CUDA device; run this on a machine with an NVIDIA GPU and its driver (nvidia-smi)")
try:
    import triton
except ImportError:
    sys.exit("Triton is not installed; install it with: pip install triton")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}")
PYTHON
code=$?
log "$(tail -n 5 "$work/kept/machine.txt")"
if [ $code -ne 0 ]; then
    log "nothing was run: $python cannot use the GPU (PYTHON=... chooses another)"
    exit 2
fi

if [ "$wheels" != - ]; then
    shopt -s nullglob
    found=("$wheels"/*.whl)
    [ ${#found[@]} -gt 0 ] || note "wheels: none in $wheels"
    for wheel in "${found[@]}"; do
        name=$(basename "$wheel")
        case $name in
            torch-* | triton-* | nvidia_*) note "$name: skipped, it would replace the machine's own" && continue ;;
        esac
        if timeout 60 "$python" -m pip install --quiet --no-deps --no-index --no-compile --disable-pip-version-check --upgrade \
            --target "$work/site" "$wheel" >"$work/pip.log" 2>&1; then
            log "$name: installed"
        else
            note "$name: not installed, $(grep -m 1 ERROR "$work/pip.log" || tail -n 1 "$work/pip.log")"
        fi
    done
fi

if ! parts=${PARTS:-tests $("$python" -c 'from benchmarks.registry import OPS; print(*OPS, "ladder", "scaling")')}; then
    log "nothing was run: benchmarks.registry cannot be imported"
    exit 2
fi
read -ra parts <<<"$parts"
for index in "${!parts[@]}"; do
    name=${parts[$index]}
    left=$((budget - SECONDS))
    if [ $left -lt 10 ]; then
        note "$name: skipped, $left of $budget s are left (PARTS=\"${parts[*]:$index}\" runs what is missing)"
        bad=1
        continue
    fi
    # Twice an even share of what is left, so that what comes first may take longer; the last may take all.
    limit=$((2 * left / (${#parts[@]} - index + 1)))
    case $name in ladder | scaling) kind=--e2e ;; *) kind=--op ;; esac
    if [ "$name" = tests ]; then
        part tests $limit "$python" -m pytest -p benchmarks.gpu_tests -p no:cacheprovider -q --tb=short -o faulthandler_timeout=100 \
            --junitxml "$work/kept/junit.xml" tests/kernels
    else
        part "$name" $limit "$python" -m benchmarks run $kind "$name" --device cuda --seconds 2 --out "$results"
    fi
done

log "" "summary, after $SECONDS of $budget s:"
for text in "${summary[@]}"; do log "  $text"; done
keep
exit $bad
