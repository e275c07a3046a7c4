#!/usr/bin/env bash
# Passwords and the token of compose.yaml, in cluster/docker/.env, for its owner's eyes alone. Those that are there stay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 077
[ -e .env ] && {
  echo ".env is there already"
  exit 0
}
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
cat >.env <<END
RAY_AUTH_TOKEN=$(random)
MLFLOW_TRACKING_USERNAME=raymed
MLFLOW_TRACKING_PASSWORD=$(random)
AWS_ACCESS_KEY_ID=$(random)
AWS_SECRET_ACCESS_KEY=$(random)
END
echo "wrote cluster/docker/.env"
