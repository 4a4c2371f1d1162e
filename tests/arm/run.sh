#!/usr/bin/env bash
# Usage: run.sh PYTHON [COUNT]. Runs csrc's checks, kernels, tests of layers and COUNT random layers (30) on 64-bit ARM,
# emulated in the environment .arm, which it makes. PYTHON has the tests' packages for this machine. Some ten minutes.
set -eu
cd "$(dirname "$0")/../.."
python=$PWD/$1 arm=$PWD/.arm
skip() { echo "skipped: $1" && exit 0; }
[ "$(. /etc/os-release 2>/dev/null && echo "$ID $VERSION_ID")" = "debian 13" ] || skip "the environment needs Debian 13"
[ "$(dpkg --print-architecture)" = amd64 ] || skip "the environment is made of programs for x86-64"
tests/arm/environment.sh "$arm" || skip "the packages of the environment cannot be had"
export PATH="$arm/bin:$PATH" FASTLSTM_QUIET=1 NUMBA_CACHE_DIR="$arm/numba"

"$python" -m pytest --numprocesses 2 -m "slow or not slow" -k on_arm tests/backends

# A copy of the tree, since the library of csrc/ that lies in a tree is that of one processor
rm -rf "$arm/tree" && mkdir "$arm/tree"
cp -r fastlstm csrc tests benchmarks pyproject.toml setup.py README.md "$arm/tree"
cd "$arm/tree"
rm -f fastlstm/_native.*
CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ LDSHARED="aarch64-linux-gnu-g++ -shared" \
    "$arm/bin/python" setup.py -q build_ext --inplace
# Without pointer authentication, whose emulation takes half of the time. Kernels are compiled by this machine.
layers=()
for cpu in neoverse-v1,pauth=off cortex-a76 max,pauth=off; do
    read -r -a machine < <(QEMU_CPU=$cpu "$arm/bin/python" -c "import llvmlite.binding as llvm
print(llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())")
    PYTHONPATH="$arm/tree" "$python" -m tests.arm.kernels "${machine[@]}"
    QEMU_CPU=$cpu "$arm/bin/python" -m tests.arm.random_layers "$((${2:-30} / 3))" &
    layers+=($!)
done
for process in "${layers[@]}"; do wait "$process"; done
"$arm/bin/python" -m pytest -p no:cacheprovider tests/backends/test_layer.py tests/backends/numba/test_numba_machines.py \
    -k "test_layer or fill_the_registers"
