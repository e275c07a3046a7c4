#!/usr/bin/env bash
# What `ray up` runs on a machine of a cloud, by aws.yaml and gcp.yaml. Every step can be run again.
#
#   node.sh setup cpu|cuda      python and raymed, in ~/venv
#   node.sh head                Ray's head, and MLflow beside it
#   node.sh limits              what jobs may count on, from the autoscaler's file; the head tells it when it starts, too
#   node.sh worker aws|gcp      Ray, and who watches for the cloud's notices
#
# ~/raymed.env has the variables, ~/.ray/auth_token the token; nobody else may read them.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$HOME/venv/bin/python
bootstrap=$HOME/ray_bootstrap_config.yaml # of Ray's autoscaler; the head alone has it
versions=$project/constraints.txt         # what the head has installed; workers get it from there, as all of ~/raymed
export PATH=$HOME/venv/bin:$PATH

# service NAME WORDS...: a unit of systemd, started again where it fails; its log is journald's, which rotates it.
service() {
  local name=$1
  shift
  sudo systemctl stop "$name" 2>/dev/null || true
  sudo systemd-run --unit="$name" --collect --uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME" \
    --property=EnvironmentFile="$HOME/raymed.env" --property=Restart=on-failure --property=RestartSec=5 \
    --property=TimeoutStopSec=60 --setenv=HOME="$HOME" --setenv=PATH="$PATH" "${@}"
}

variables() {
  set -a
  # shellcheck disable=SC1091
  . "$HOME/raymed.env"
  set +a
}

# A bucket of Cloud Storage at $RAYMED_HOME; S3 needs no mount.
bucket() {
  [ -n "${RAYMED_BUCKET:-}" ] || return 0
  mountpoint --quiet "$RAYMED_HOME" && return 0
  sudo install --directory --owner="$(id -u)" --group="$(id -g)" "$RAYMED_HOME"
  # A checkpoint is a folder that is renamed when it is whole, which gcsfuse refuses without a limit. With one it moves
  # file by file, and that does no harm: index.json is written after it, and a checkpoint's state.json has a seal.
  gcsfuse --implicit-dirs --rename-dir-limit 1000 "$RAYMED_BUCKET" "$RAYMED_HOME"
}

# A new machine runs apt itself. apt-get can wait for its locks, but not in `update`.
update() {
  for _ in {1..60}; do
    sudo apt-get -qq update && return
    sleep 10
  done
  echo "apt-get update has failed for ten minutes" >&2
  return 1
}

packages() {
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install --yes --no-install-recommends "$@"
}

mounter() {
  [ -n "${RAYMED_BUCKET:-}" ] || return 0
  command -v gcsfuse >/dev/null && return 0
  local signed=/usr/share/keyrings/gcsfuse.asc apt=https://packages.cloud.google.com/apt
  curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$signed" >/dev/null
  echo "deb [signed-by=$signed] $apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  update
  packages gcsfuse
}

setup() {
  variables
  update
  packages python3-venv python3-dev g++
  mounter
  "$python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$HOME/venv" # also one that was half made
  local how=() extras=train,cluster,serve
  [ "$1" = cuda ] || how+=(--extra-index-url https://download.pytorch.org/whl/cpu)
  # Ray joins nodes of one version only. The head is free to take newer ones, and says which when it starts.
  [ -e "$bootstrap" ] || [ ! -e "$versions" ] || how+=(--constraint "$versions")
  [ -z "${RAYMED_BUCKET:-}" ] || extras+=,gcp # with which the autoscaler starts Google's machines
  "$python" -m pip install --quiet "${how[@]}" "$project[$extras]"
}

# pinned: the versions of this head, without local ones: torch+cpu here is torch with CUDA on workers.
pinned() {
  "$python" -m pip freeze --exclude raymed | sed -E 's/^([^ ]+==[^+]+)\+.*/\1/'
}

head() {
  variables
  bucket
  export MLFLOW_TRACKING_URI=http://${RAY_HEAD_IP:-$(hostname --ip-address)}:5000
  pinned >"$versions"
  service raymed-mlflow "$python" -m raymed.cluster.mlflow_server --folder "$HOME/mlflow" --host 0.0.0.0
  ray stop
  ulimit -n 65536
  ray start --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config="$bootstrap"
  limits || echo "jobs will count only nodes that are up" >&2
}

limits() {
  variables
  RAY_ADDRESS=127.0.0.1:6379 "$python" -m raymed.train.places.growth "$bootstrap"
}

worker() {
  variables
  bucket
  export MLFLOW_TRACKING_URI=http://$RAY_HEAD_IP:5000
  ray stop
  ulimit -n 65536
  ray start --address="$RAY_HEAD_IP:6379"
  service raymed-spot "$python" -m raymed.cluster.spot --cloud "$1" --address "$RAY_HEAD_IP:6379"
}

case "${1:-}" in
setup) setup "$2" ;;
head) head ;;
limits) limits ;;
worker) worker "$2" ;;
*)
  echo "usage: node.sh setup cpu|cuda | head | limits | worker aws|gcp" >&2
  exit 2
  ;;
esac
