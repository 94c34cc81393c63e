# What every finding begins with: a folder of its own, which is gone at its end, and packages in it.
#
# A finding exits with
#   0  while the libraries behave as it says,
#   1  when one of them has changed,
#   2  when packages could not be had: it says "could not install" and what, and nothing is known.
#
# After `source`, the working folder is the new one, and there are
#   $python   the interpreter of a virtual environment in it
#   install   what pip installs into that: packages and options
#   unpack    for a wheel whose metadata refuses this Python, although what is used of it runs: the
#             Python that it asks for, and the package. What it depends on is to be installed besides
# and Python imports router_losses, which is beside this file.

could_not_install() {
    echo "could not install $*: nothing is known about this finding" >&2
    exit 2
}

install() {
    "$python" -m pip install --quiet "$@" || could_not_install "$*"
}

unpack() {
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$1" \
        --dest wheel "$2" || could_not_install "$2"
    "$python" -m zipfile -e wheel/*.whl packages || could_not_install "$2"
}

findings=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(mktemp -d) || could_not_install "anything without a temporary folder"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python=$folder/venv/bin/python
python3 -m venv venv || could_not_install "a virtual environment"
export PYTHONPATH="$folder/packages:$findings" PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=1 # sums have one order
