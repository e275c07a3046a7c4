#!/usr/bin/env bash
# What a Google Cloud project needs once, before `make cluster-up PROVIDER=gcp`; by somebody who may make networks:
#
#   bash cluster/gcp-once.sh PROJECT REGION BUCKET        the bucket must exist
#
# The network lets in nothing but SSH by Identity-Aware Proxy, and the cluster's machines among themselves. Cloud NAT, their
# way out, costs about 0.045 USD an hour and by traffic. Not run against Google Cloud here.
set -euo pipefail
[ $# -eq 3 ] || {
  echo "usage: gcp-once.sh PROJECT REGION BUCKET" >&2
  exit 2
}
project=$1 region=$2 bucket=$3
iap=35.235.240.0/20 # where Identity-Aware Proxy comes from
inside=10.77.0.0/20

compute() { gcloud --quiet --project "$project" compute "$@"; }

# unless SHOW -- MAKE: make what is not there yet.
unless() {
  local show=()
  while [ "$1" != -- ]; do
    show+=("$1")
    shift
  done
  shift
  "${show[@]}" >/dev/null 2>&1 || "$@"
}

gcloud --quiet --project "$project" services enable {compute,iam,iap,cloudresourcemanager}.googleapis.com

unless compute networks describe raymed -- compute networks create raymed --subnet-mode custom
unless compute networks subnets describe raymed --region "$region" -- \
  compute networks subnets create raymed --network raymed --region "$region" --range "$inside" \
  --enable-private-ip-google-access
unless compute firewall-rules describe raymed-iap -- \
  compute firewall-rules create raymed-iap --network raymed --allow tcp:22 --source-ranges "$iap"
unless compute firewall-rules describe raymed-inside -- \
  compute firewall-rules create raymed-inside --network raymed --allow tcp,udp,icmp --source-ranges "$inside"
unless compute routers describe raymed --region "$region" -- \
  compute routers create raymed --network raymed --region "$region"
unless compute routers nats describe raymed --router raymed --region "$region" -- \
  compute routers nats create raymed --router raymed --region "$region" --auto-allocate-nat-external-ips \
  --nat-all-subnet-ip-ranges

# account NAME TITLE: one that may use the bucket, whose project may be another.
account() {
  local email=$1@$project.iam.gserviceaccount.com
  unless gcloud --quiet --project "$project" iam service-accounts describe "$email" -- \
    gcloud --quiet --project "$project" iam service-accounts create "$1" --display-name "$2"
  gcloud --quiet storage buckets add-iam-policy-binding "gs://$bucket" \
    --member "serviceAccount:$email" --role roles/storage.objectUser
}
account raymed-worker "raymed workers"
account ray-autoscaler-sa-v1 "raymed head" # Ray's launcher takes the one of this name that is there
