# Sourced by the scripts beside it: makes .venv where there is none and installs delora with the extras named in $1, and
# says so.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || { echo "making $PWD/.venv" >&2; python3 -m venv .venv; }
stamp="$1 $(cat pyproject.toml constraints.txt | sha256sum)"
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$stamp" ]; then
    echo "installing delora[$1] into $PWD/.venv" >&2
    .venv/bin/python -m pip install --quiet -c constraints.txt -e ".[$1]"
    echo "$stamp" > ".venv/installed-$1"
fi
