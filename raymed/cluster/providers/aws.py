"""On AWS: an on-demand head, spot GPU workers, S3. What the account needs once a region is in cluster/aws-once.yaml.

No port is open to anybody: SSH, dashboard and MLflow come through AWS's Session Manager. Machines have roles, no keys.
"""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymed.cluster.providers import Line, launcher
from raymed.cluster.providers.launcher import PROJECT, Launch
from raymed.cluster.state import Cluster
from raymed.config import UserError

_ONCE = (
    "aws cloudformation deploy --region {region} --stack-name raymed --template-file cluster/aws-once.yaml "
    "--capabilities CAPABILITY_NAMED_IAM --parameter-overrides Bucket=BUCKET Vpc=VPC"
)
_KEY = re.compile("raymed-[0-9a-f]{8}")
_PROGRAMS = {
    "ssh": "apt install openssh-client",
    "rsync": "apt install rsync",
    "aws": "the AWS command line, version 2",
    "session-manager-plugin": "AWS's plugin for Session Manager",
}


@dataclass(frozen=True)
class Config:
    """Flags of `up aws`.

    storage: s3://BUCKET/PREFIX of the bucket that cluster/aws-once.yaml was given.
    region: where; default: $AWS_REGION, $AWS_DEFAULT_REGION, or that of the profile.
    max_workers: at most so many worker machines; default: as before, at first what the file says.
    file: the cluster's file.
    """

    storage: str
    region: str | None = None
    max_workers: int | None = None
    file: Path = PROJECT / "cluster" / "aws.yaml"


def up(config: Config) -> Cluster:
    """See `launcher.up`. Raises UserError, before anything starts, for missing credentials, programs, or parts of the
    account."""
    return launcher.up(prepare(config))


def prepare(config: Config) -> Launch:
    """Everything that can be known before a machine is started. Raises UserError."""
    if not config.storage.startswith("s3://") or not config.storage.removeprefix("s3://").strip("/"):
        raise UserError(f"--storage must be s3://BUCKET/PREFIX, which outlives the machines, got {config.storage!r}")
    session = _session(config.region)
    launcher.need(*_PROGRAMS, by=_PROGRAMS)
    group, subnets = _network(session)
    _profiles(session)
    variables = {"RAYMED_HOME": config.storage.rstrip("/"), "AWS_DEFAULT_REGION": session.region_name}
    place = {"account": _account(session), "region": session.region_name}

    def change(content: dict[str, Any]) -> None:
        _name_key(content)
        was = launcher.last("aws").get("available_node_types", {})
        for name, kind in content["available_node_types"].items():
            _complete(kind["node_config"], was.get(name, {}).get("node_config", {}), group, subnets, session)

    return Launch(
        "aws",
        config.file,
        {"region": session.region_name},
        variables,
        place,
        machines=lambda: machines(session),
        end=lambda ids: _end(ids, session.region_name),
        change=change,
        max_workers=config.max_workers,
    )


def status(cluster: Cluster) -> Sequence[Line]:
    """See `launcher.status`."""
    return launcher.status(cluster)


def down(cluster: Cluster) -> None:
    """End all of it, its key pair too. Raises UserError with credentials of another account, and where machines are
    left, or cannot be looked for; it is then still remembered."""
    region = cluster.environment["AWS_DEFAULT_REGION"]
    _check_account(cluster, _session(region))

    def check() -> None:
        left = machines(_session(region))
        if left:
            raise UserError(f"machines are left, and cost: {_end(left, region)}, then take the cluster down again")
        _remove_key(_session(region))

    launcher.down(cluster, check)


def reached(cluster: Cluster) -> AbstractContextManager[str]:
    """See `launcher.reached`."""
    return launcher.reached(cluster)


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """See `launcher.logs`."""
    return launcher.logs(cluster)


def machines(session: Any) -> list[str]:
    """Ids of the cluster's machines that run or will."""
    states = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}
    filters = [{"Name": "tag:ray-cluster-name", "Values": ["raymed"]}, states]
    found = session.client("ec2").describe_instances(Filters=filters)["Reservations"]
    return [instance["InstanceId"] for reservation in found for instance in reservation["Instances"]]


def _end(ids: Sequence[str], region: str) -> str:
    return f"aws ec2 terminate-instances --region {region} --instance-ids {' '.join(ids)}"


def _check_account(cluster: Cluster, session: Any) -> None:
    """Raises UserError for another account than the cluster's: no machine would be found there, as if none ran."""
    was, now = cluster.facts.get("place", {}).get("account"), _account(session)
    if was is not None and was != now:
        raise UserError(
            f"the cluster is in account {was}, and this machine's credentials are of account {now}: set AWS_PROFILE, "
            "or log in, as it was when the cluster was brought up"
        )


def _account(session: Any) -> str:
    return session.client("sts").get_caller_identity()["Account"]


def _session(region: str | None) -> Any:
    """Credentials that AWS takes. Raises UserError for none, or others."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    how = "aws sso login, aws configure, or set AWS_PROFILE; this machine needs them, the cluster's do not"
    try:
        session = boto3.Session(region_name=region or os.environ.get("AWS_REGION"))
        if session.region_name is None:
            raise UserError("no AWS region: give --region, such as --region eu-central-1")
        if session.get_credentials() is None:
            raise UserError(f"no AWS credentials on this machine: {how}")
        session.client("sts").get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"AWS does not take this machine's credentials ({error}): {how}") from None
    return session


def _network(session: Any) -> tuple[str, list[str]]:
    """The security group that cluster/aws-once.yaml made, and the subnets of its network."""
    ec2 = session.client("ec2")
    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["raymed"]}])["SecurityGroups"]
    if len(groups) != 1:
        once = _ONCE.format(region=session.region_name)
        raise UserError(f"{session.region_name} has {len(groups)} security groups named raymed, not one. Once: {once}")
    _closed(groups[0])
    within = [{"Name": "vpc-id", "Values": [groups[0]["VpcId"]]}]
    subnets = ec2.describe_subnets(Filters=within)["Subnets"]
    by_zone = sorted((subnet["AvailabilityZone"], subnet["SubnetId"]) for subnet in subnets)
    return groups[0]["GroupId"], [subnet for _, subnet in by_zone]


def _closed(group: dict[str, Any]) -> None:
    """Raises UserError for a group that lets anybody in."""
    for rule in group["IpPermissions"]:
        world = [place.get("CidrIp") or place.get("CidrIpv6") for place in rule["IpRanges"] + rule["Ipv6Ranges"]]
        if {"0.0.0.0/0", "::/0"} & set(world):
            raise UserError(
                f"security group {group['GroupId']} (raymed) lets the whole world in to port "
                f"{rule.get('FromPort', 'all')}: remove that rule; Session Manager needs none"
            )


def _profiles(session: Any) -> None:
    from botocore.exceptions import ClientError

    region = session.region_name
    for name in (f"raymed-head-{region}", f"raymed-worker-{region}"):
        try:
            session.client("iam").get_instance_profile(InstanceProfileName=name)
        except ClientError as error:
            raise UserError(f"no instance profile {name} ({error}). Once: {_ONCE.format(region=region)}") from None


def _name_key(content: dict[str, Any]) -> None:
    """A key pair for this cluster alone: Ray makes it by that name. One that was brought up with another keeps that."""
    if "ssh_private_key" in content["auth"]:
        return
    last = launcher.last("aws")
    new = {"key_name": f"raymed-{secrets.token_hex(4)}"}
    own = last["provider"].get("key_pair") if last else content["provider"].get("key_pair", new)
    content["provider"] |= {"key_pair": own} if own else {}


def _remove_key(session: Any) -> None:
    """The key pair that was made for the cluster, and its file here. A key of the user's own stays."""
    from botocore.exceptions import ClientError

    name = launcher.last("aws").get("provider", {}).get("key_pair", {}).get("key_name", "")
    if not _KEY.fullmatch(name):
        return
    (Path.home() / ".ssh" / f"{name}.pem").unlink(missing_ok=True)
    try:
        session.client("ec2").delete_key_pair(KeyName=name)
    except ClientError as error:
        print(f"the key pair {name} stays in {session.region_name}, useless without its file: {error}", file=sys.stderr)


def _complete(node: dict[str, Any], was: dict[str, Any], group: str, subnets: Sequence[str], session: Any) -> None:
    """What a file cannot know: ids of this account, and of today's machine image. What was looked up for the cluster
    that is remembered stays: Ray ends machines of another image or of other subnets, the head among them."""
    if interfaces := node.get("NetworkInterfaces"):
        for interface in interfaces:
            interface.update(SubnetId=subnets[0], Groups=[group])
    else:
        node.update(SubnetIds=was.get("SubnetIds", list(subnets)), SecurityGroupIds=[group])
    image = node.get("ImageId", "")
    if image.startswith("resolve:ssm:"):  # the head, which starts the workers, may not ask for it
        name = image.removeprefix("resolve:ssm:")
        node["ImageId"] = was.get("ImageId") or session.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
