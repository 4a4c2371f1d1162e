#!/usr/bin/env bash
# Usage: environment.sh FOLDER. Makes in FOLDER what runs 64-bit ARM programs on a Debian for x86-64, and installs
# nothing: bin/python, a Python for ARM with torch and numba under QEMU; bin/aarch64-linux-gnu-g++, a compiler for ARM;
# bin/llvm-mca. It downloads half a gigabyte. QEMU_CPU names another processor than "max", which has all instructions.
set -eu
mkdir -p "$1"
folder=$(cd "$1" && pwd)
[ ! -e "$folder/complete" ] || exit 0
PYTHON=3.13 # of Debian 13
TOOLS="qemu-user llvm-19 libllvm19 binutils-aarch64-linux-gnu cpp-14-aarch64-linux-gnu gcc-14-aarch64-linux-gnu
  g++-14-aarch64-linux-gnu gcc-14-aarch64-linux-gnu-base libc6-arm64-cross libc6-dev-arm64-cross
  linux-libc-dev-arm64-cross libgcc-14-dev-arm64-cross libgcc-s1-arm64-cross libstdc++-14-dev-arm64-cross
  libstdc++6-arm64-cross libubsan1-arm64-cross libisl23 libmpc3 libmpfr6 libgmp10 libjansson4"
SYSTEM="python$PYTHON python$PYTHON-minimal libpython$PYTHON-minimal libpython$PYTHON-stdlib libc6 libc-bin libgcc-s1
  libstdc++6 libexpat1 zlib1g libbz2-1.0 liblzma5 libsqlite3-0 libffi8 libssl3t64 libuuid1 libncursesw6 libtinfo6
  libreadline8t64 libgomp1 libzstd1 libdb5.3t64 libcrypt1 libatomic1"
PACKAGES="torch==2.9.1 numpy numba==0.68.1 llvmlite pytest hypothesis sympy mpmath networkx jinja2 markupsafe filelock
  fsspec typing_extensions setuptools iniconfig pluggy packaging pygments sortedcontainers"

site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m 1 '^http.*/debian/\?$')
unpack() { # NAME ARCHITECTURE PACKAGE...: downloads packages of Debian, and unpacks them into the folder of this name
    local name=$1 architecture=$2 apt=$folder/apt-$2 && shift 2
    mkdir -p "$folder/$name" "$apt/lists/partial" "$apt/archives/partial"
    echo "deb $site trixie main" > "$apt/sources.list"
    : > "$apt/status"
    local options="-qq -o Dir::State=$apt -o Dir::State::status=$apt/status -o Dir::Cache=$apt
      -o Dir::Etc::sourcelist=$apt/sources.list -o Dir::Etc::sourceparts=- -o APT::Architecture=$architecture
      -o APT::Architectures=$architecture -o APT::Sandbox::User=root"
    apt-get $options update
    (cd "$apt" && apt-get $options download "$@")
    for package in "$apt"/*.deb; do dpkg -x "$package" "$folder/$name"; done
    rm -r "$apt"
}
unpack tools amd64 $TOOLS
unpack system arm64 $SYSTEM
[ -e "$folder/system/lib" ] || ln -s usr/lib "$folder/system/lib"

mkdir -p "$folder/wheels"
python3 -m pip download -q --dest "$folder/wheels" --only-binary=:all: --no-deps --python-version "$PYTHON" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 $PACKAGES
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/packages"; done
rm -r "$folder/wheels"
# The system starts no programs of another processor: a process that Python starts has to be this Python again.
echo "import sys; sys.executable = sys._base_executable = '$folder/bin/python'" > "$folder/packages/sitecustomize.py"

mkdir -p "$folder/bin"
script() { # NAME: writes a program of bin/ from the standard input
    { echo '#!/usr/bin/env bash'; echo "folder='$folder'"; cat; } > "$folder/bin/$1"
    chmod +x "$folder/bin/$1"
}
script qemu-aarch64 <<'SCRIPT'
exec "$folder/tools/usr/bin/qemu-aarch64" "$@"
SCRIPT
script python <<SCRIPT
export PYTHONPATH="\$folder/packages\${PYTHONPATH:+:\$PYTHONPATH}" QEMU_CPU="\${QEMU_CPU:-max}"
exec "\$folder/bin/qemu-aarch64" -L "\$folder/system" -E LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu \\
    "\$folder/system/usr/bin/python$PYTHON" "\$@"
SCRIPT
for name in g++ gcc; do
    script "aarch64-linux-gnu-$name" <<SCRIPT
tools="\$folder/tools/usr"
export LD_LIBRARY_PATH="\$tools/lib/x86_64-linux-gnu" PATH="\$tools/bin:\$PATH"
exec "\$tools/bin/aarch64-linux-gnu-$name-14" -B"\$tools/lib/gcc-cross/aarch64-linux-gnu/14" --sysroot="\$folder/tools" \\
    -idirafter "\$tools/aarch64-linux-gnu/include" -L"\$tools/aarch64-linux-gnu/lib" "\$@"
SCRIPT
done
script llvm-mca <<'SCRIPT'
export LD_LIBRARY_PATH="$folder/tools/usr/lib/x86_64-linux-gnu"
exec "$folder/tools/usr/lib/llvm-19/bin/llvm-mca" "$@"
SCRIPT
"$folder/bin/python" -c "import llvmlite.binding as llvm, numpy, platform, torch; print(platform.machine(), torch.__version__)"
touch "$folder/complete"
