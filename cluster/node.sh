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
  gcsfuse --implicit-dirs "$RAYMED_BUCKET" "$RAYMED_HOME"
}

setup() {
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install --yes --no-install-recommends python3-venv python3-dev g++
  [ -x "$python" ] || python3 -m venv "$HOME/venv"
  local index=()
  [ "$1" = cuda ] || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  "$python" -m pip install --quiet "${index[@]}" "$project[train,cluster,serve]"
}

head() {
  variables
  bucket
  export MLFLOW_TRACKING_URI=http://${RAY_HEAD_IP:-$(hostname --ip-address)}:5000
  service raymed-mlflow "$python" -m raymed.cluster.mlflow_server --folder "$HOME/mlflow" --host 0.0.0.0
  ray stop
  ulimit -n 65536
  ray start --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config="$HOME/ray_bootstrap_config.yaml"
  limits || echo "jobs will count only nodes that are up" >&2
}

limits() {
  variables
  RAY_ADDRESS=127.0.0.1:6379 "$python" -m raymed.train.places.growth "$HOME/ray_bootstrap_config.yaml"
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
