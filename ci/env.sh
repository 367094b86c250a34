# Sourced by the two scripts: an environment with everything, made once, and found again in well under two seconds.
# Uses the active virtualenv or conda environment when there is one, else makes .venv beside the checkout's root.

apr_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

apr_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: expected Python 3.11 or newer, found none; install it and run again" >&2
    return 9
}

apr_environment() {
    local prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -z "$prefix" ]; then
        prefix="$apr_root/.venv"
        if [ ! -x "$prefix/bin/python" ]; then
            echo "making $prefix"
            "$(apr_python)" -m venv "$prefix" || return 9
        fi
    fi
    # The stamp is the content that decides what is installed; a changed pin installs again, nothing else does.
    local stamp want
    stamp="$prefix/.apr-stamp"
    want="$(cat "$apr_root/pyproject.toml" "$apr_root/constraints.txt" "$apr_root/constraints-gpu.txt" | sha256sum) $apr_root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing from constraints.txt into $prefix"
        # torch by its pin first: another package's open range would take the build with CUDA.
        "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check \
            "$(grep '^torch==' "$apr_root/constraints.txt")" -c "$apr_root/constraints.txt" || return 9
        "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$apr_root/constraints.txt" -e "$apr_root[dev,peers]" || return 9
        # The kernels' compiler alone, without the CUDA build of torch that its pin belongs to: it checks them without a
        # device. Where there is no build of it, that check says NOT_RUN.
        "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            "$(grep '^triton==' "$apr_root/constraints-gpu.txt")" || echo "no triton here: gpu-check will be NOT_RUN"
        echo "$want" >"$stamp"
    fi
    export PATH="$prefix/bin:$PATH"
    export PYTHON="$prefix/bin/python"
}

apr_environment || exit $?
