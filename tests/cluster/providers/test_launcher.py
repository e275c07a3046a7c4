"""AWS and Google Cloud: what is said before a machine is started, and, against moto's copy of AWS, which machines Ray's
launcher would start: with which roles, groups, images and prices."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from nodes import free_port, wait_for

from raymed.cluster import state
from raymed.cluster.providers import aws, gcp, launcher
from raymed.cluster.state import Cluster
from raymed.config import UserError

REGION = "us-east-1"
IMAGE = "ami-12c6146b"  # one that moto knows
pytestmark = pytest.mark.usefixtures("nobody")


def test_aws_without_credentials_or_region():
    with pytest.raises(UserError, match="no AWS region: give --region"):
        aws.up(aws.Config(storage="s3://bucket/raymed"))
    with pytest.raises(UserError, match="no AWS credentials on this machine: aws sso login"):
        aws.up(aws.Config(storage="s3://bucket/raymed", region=REGION))
    assert state.load() is None


@pytest.mark.parametrize("storage", ["", "bucket", "s3://", "gs://bucket"])
def test_a_storage_that_does_not_outlive_the_machines(storage):
    with pytest.raises(UserError, match="--storage must be s3://"):
        aws.up(aws.Config(storage=storage, region=REGION))


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """AWS's copy on this machine, with the account prepared by cluster/aws-once.yaml; its URL."""
    server = shutil.which("moto_server", path=str(Path(sys.executable).parent)) or shutil.which("moto_server")
    if server is None:
        pytest.skip("pip install 'moto[cloudformation,ec2,server]'")
    port = free_port()
    with (tmp_path_factory.mktemp("moto") / "log").open("w") as log:
        process = subprocess.Popen([server, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        wait_for(lambda: _listens(port), 120, "moto")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def account(moto, nobody, tmp_path, monkeypatch):
    """An account with its stack, credentials, and programs by the names that the way in needs."""
    import boto3

    own = {"AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("aws", "session-manager-plugin", "ssh", "rsync"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    httpx.post(f"{moto}/moto-api/reset")
    session = boto3.Session(region_name=REGION)
    make_stack(session)
    return session


def make_stack(session: Any) -> None:
    """What an account needs once, in the session's region."""
    formation = session.client("cloudformation")
    network = session.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
    values = [
        {"ParameterKey": "Bucket", "ParameterValue": "bucket"},
        {"ParameterKey": "Vpc", "ParameterValue": network},
    ]
    body = (launcher.PROJECT / "cluster" / "aws-once.yaml").read_text()
    formation.create_stack(
        StackName="raymed", TemplateBody=body, Parameters=values, Capabilities=["CAPABILITY_NAMED_IAM"]
    )


@pytest.fixture
def file(tmp_path):
    """cluster/aws.yaml with an image that moto has: it has none of Ubuntu's."""
    content = yaml.safe_load((launcher.PROJECT / "cluster" / "aws.yaml").read_text())
    for kind in content["available_node_types"].values():
        kind["node_config"]["ImageId"] = IMAGE
    path = tmp_path / "aws.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_region_that_is_not_prepared(account, file):
    with pytest.raises(UserError, match="eu-west-1 has 0 security groups .*cloudformation deploy --region eu-west-1"):
        aws.prepare(aws.Config("s3://bucket/raymed", "eu-west-1", file=file))


def test_an_account_with_two_regions(account, file):
    """Roles are the account's: a second stack would find those of the first, and be rolled back."""
    import boto3

    make_stack(boto3.Session(region_name="eu-west-1"))
    names = []
    for region in (REGION, "eu-west-1"):
        content = launcher._content(aws.prepare(aws.Config("s3://bucket/raymed", region, file=file)))
        kinds = content["available_node_types"].values()
        names.append({kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds})
    assert names == [{f"raymed-head-{region}", f"raymed-worker-{region}"} for region in (REGION, "eu-west-1")]
    gone = {"InstanceProfileName": "raymed-head-eu-west-1"}
    account.client("iam").remove_role_from_instance_profile(RoleName="raymed-head-eu-west-1", **gone)
    account.client("iam").delete_instance_profile(**gone)
    with pytest.raises(UserError, match="no instance profile raymed-head-eu-west-1 .*deploy --region eu-west-1"):
        aws.prepare(aws.Config("s3://bucket/raymed", "eu-west-1", file=file))


def test_a_group_that_lets_the_world_in(account, file):
    ec2 = account.client("ec2")
    [group] = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["raymed"]}])["SecurityGroups"]
    world = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[world])
    with pytest.raises(UserError, match="lets the whole world in to port 8265"):
        aws.prepare(aws.Config("s3://bucket/raymed", REGION, file=file))


def test_machines_that_ray_would_start(account, file, monkeypatch):
    """Ray's own bootstrap, and its node provider, on what was written."""
    path = launcher.written(aws.prepare(aws.Config("s3://bucket/raymed", REGION, max_workers=2, file=file)))
    content = yaml.safe_load(path.read_text())
    assert content["max_workers"] == 2 and content["provider"]["region"] == REGION
    for secret in (path, state.folder() / "ray.token", state.folder() / "node.env"):
        assert secret.stat().st_mode & 0o777 == 0o600
    variables = (state.folder() / "node.env").read_text()
    assert "RAYMED_HOME=s3://bucket/raymed\n" in variables and "MLFLOW_TRACKING_PASSWORD=" in variables
    password = [line for line in variables.splitlines() if "PASSWORD" in line]
    launch = aws.prepare(aws.Config("s3://bucket/raymed", REGION, file=file))
    assert launch.place["region"] == REGION and re.fullmatch(r"\d{12}", launch.place["account"])
    launcher.written(launch)
    assert password[0] in (state.folder() / "node.env").read_text(), "it stays"

    for kind in ("head", "gpu", "efa"):
        _start(content, kind)
    reservations = account.client("ec2").describe_instances()["Reservations"]
    started = {i["InstanceType"]: i for r in reservations for i in r["Instances"]}
    head, worker, near = started["m7i.2xlarge"], started["g6.4xlarge"], started["p4d.24xlarge"]
    assert near["InstanceLifecycle"] == "spot"
    assert content["available_node_types"]["efa"]["node_config"]["Placement"] == {"GroupName": "raymed"}
    assert "spot" not in head.get("InstanceLifecycle", "") and worker["InstanceLifecycle"] == "spot"
    assert head["IamInstanceProfile"]["Arn"].endswith(f"/raymed-head-{REGION}")
    assert worker["IamInstanceProfile"]["Arn"].endswith(f"/raymed-worker-{REGION}")
    for machine in (head, worker):
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["raymed"]
        assert machine["ImageId"] == IMAGE
    for group in account.client("ec2").describe_security_groups()["SecurityGroups"]:
        if group["GroupName"] != "default":
            assert not [rule for rule in group["IpPermissions"] if rule["IpRanges"]], "nobody from outside"

    left = aws.machines(account)
    assert set(left) == {head["InstanceId"], worker["InstanceId"], near["InstanceId"]}
    account.client("ec2").terminate_instances(InstanceIds=left)
    assert aws.machines(account) == []


def most(launch: launcher.Launch) -> tuple[int, dict[str, int]]:
    """Workers of all types together, and of each, as Ray reads the written file."""
    from ray.autoscaler._private.util import prepare_config

    content = prepare_config(yaml.safe_load(launcher.written(launch).read_text()))
    return content["max_workers"], {name: t["max_workers"] for name, t in content["available_node_types"].items()}


def test_as_many_workers_as_are_asked_for_on_aws(account, file):
    for asked, count in ((8, 8), (None, 4)):
        launch = aws.prepare(aws.Config("s3://bucket/raymed", REGION, max_workers=asked, file=file))
        assert most(launch) == (count, {"head": 0, "gpu": count, "efa": 0})


def test_as_many_workers_as_are_asked_for_on_google(monkeypatch):
    monkeypatch.setattr(gcp, "_project", lambda given: "project")
    monkeypatch.setattr(gcp, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "need", lambda *programs, by: None)
    for asked, count in ((8, 8), (None, 4)):
        launch = gcp.prepare(gcp.Config("bucket", "europe-west4-a", max_workers=asked))
        assert most(launch) == (count, {"head": 0, "gpu": count})


def test_the_head_may_be_the_first_of_the_account_to_ask_for_spot_machines(account):
    """AWS then makes a role of its own, as whoever asks. moto does not demand it."""
    policy = account.client("iam").get_role_policy(RoleName=f"raymed-head-{REGION}", PolicyName="raymed-autoscaler")
    statements = yaml.safe_load(policy["PolicyDocument"])["Statement"]
    [statement] = [s for s in statements if s["Action"] == "iam:CreateServiceLinkedRole"]
    assert re.fullmatch(r"arn:aws:iam::\d{12}:role/aws-service-role/spot\.amazonaws\.com/\*", statement["Resource"])
    assert statement["Condition"] == {"StringLike": {"iam:AWSServiceName": "spot.amazonaws.com"}}


def _start(content: dict, kind: str) -> None:
    """As Ray's launcher and autoscaler do."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    ready = bootstrap_aws(prepare_config(content))
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    told = {"ray-node-name": kind, "ray-node-type": kind, "ray-user-node-type": kind}
    provider.create_node(ready["available_node_types"][kind]["node_config"], told, 1)


def test_a_cluster_of_somebody_else_is_left_alone(account, file, monkeypatch):
    """Ray's launcher would take its head, which has another key, for one that is out of date, and end it."""
    monkeypatch.setattr(launcher, "ray", lambda words: pytest.fail("nothing is started"))
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "raymed"}]}]
    ec2 = account.client("ec2")
    [head] = ec2.run_instances(ImageId=IMAGE, MinCount=1, MaxCount=1, TagSpecifications=tags)["Instances"]
    machine = head["InstanceId"]
    said = rf"runs in account \d+, region {REGION} already \({machine}\).* nothing was started: .*"
    with pytest.raises(UserError, match=f"{said}terminate-instances --region {REGION} --instance-ids {machine}"):
        aws.up(aws.Config("s3://bucket/raymed", REGION, file=file))
    assert state.load() is None and not launcher.last("aws")


def test_what_was_looked_up_for_a_cluster_stays(account, file):
    """Ray ends a head of another image or of other subnets, and workers too."""
    content = yaml.safe_load(file.read_text())
    content["available_node_types"]["head"]["node_config"]["ImageId"] = "resolve:ssm:/image"
    file.write_text(yaml.safe_dump(content))
    launch = aws.prepare(aws.Config("s3://bucket/raymed", REGION, file=file))

    def head(image: str) -> dict:
        account.client("ssm").put_parameter(Name="/image", Value=image, Type="String", Overwrite=True)
        return yaml.safe_load(launcher.written(launch).read_text())["available_node_types"]["head"]["node_config"]

    first = head("ami-1")
    assert first["ImageId"] == "ami-1"
    state.save(Cluster("aws"))
    network = account.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
    account.client("ec2").create_subnet(VpcId=network, CidrBlock="172.31.240.0/24", AvailabilityZone=f"{REGION}a")
    launch = aws.prepare(aws.Config("s3://bucket/raymed", REGION, file=file))
    assert head("ami-2") == first
    state.forget()
    now = head("ami-2")
    assert now["ImageId"] == "ami-2" and len(now["SubnetIds"]) == len(first["SubnetIds"]) + 1


def test_the_key_that_was_made_for_a_cluster_goes_with_it(account, file, monkeypatch):
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    def keys() -> list[str]:
        return [pair["KeyName"] for pair in account.client("ec2").describe_key_pairs()["KeyPairs"]]

    monkeypatch.setattr(launcher, "ray", lambda words: 0)
    account.client("ec2").create_key_pair(KeyName="colleague")
    launch = aws.prepare(aws.Config("s3://bucket/raymed", REGION, file=file))
    path = launcher.written(launch)
    cluster = Cluster("aws", environment={"AWS_DEFAULT_REGION": REGION}, facts={"file": str(path)})
    state.save(cluster)
    content = launcher.last("aws")
    made = Path(bootstrap_aws(prepare_config(content))["auth"]["ssh_private_key"])
    assert made.is_file() and sorted(keys()) == ["colleague", made.stem]
    assert yaml.safe_load(launcher.written(launch).read_text()) == content, "it stays while the cluster is remembered"
    aws.down(cluster)
    assert keys() == ["colleague"] and not made.exists() and state.load() is None


def test_a_key_of_the_users_own_stays(account):
    content = {"provider": {"key_pair": {"key_name": "raymed-team"}}, "auth": {}}
    aws._name_key(content)
    assert content["provider"]["key_pair"] == {"key_name": "raymed-team"}
    account.client("ec2").create_key_pair(KeyName="raymed-team")
    state.save(Cluster("aws"))
    (state.folder() / "aws.yaml").write_text(yaml.safe_dump(content))
    aws._remove_key(account)
    assert account.client("ec2").describe_key_pairs()["KeyPairs"]
    (state.folder() / "aws.yaml").write_text("provider: {type: aws}")
    aws._name_key(content)
    assert content["provider"]["key_pair"] == {"key_name": "raymed-team"}


@pytest.mark.slow
def test_an_up_that_fails_is_remembered_and_taken_down(account, file):
    """Ray's launcher itself, on a type of machine that AWS does not have."""
    content = yaml.safe_load(file.read_text())
    content["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "nobody"}
    content["available_node_types"]["head"]["node_config"]["ImageId"] = "ami-00000000000000000"
    content["available_node_types"]["head"]["node_config"]["InstanceType"] = "m0.none"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="`ray up` failed"):
        aws.up(aws.Config("s3://bucket/raymed", REGION, file=file))
    cluster = state.required()
    assert cluster.provider == "aws" and cluster.environment["RAY_AUTH_MODE"] == "token"
    assert not aws.status(cluster)[0].is_up
    aws.down(cluster)
    assert state.load() is None and aws.machines(account) == []


def test_machines_that_are_left_are_remembered(account, monkeypatch):
    """Ray's launcher says that it is done, and a machine still runs."""
    monkeypatch.setattr(launcher, "ray", lambda words: 0)
    ec2 = account.client("ec2")
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "raymed"}]}]
    [machine] = ec2.run_instances(ImageId=IMAGE, MinCount=1, MaxCount=1, TagSpecifications=tags)["Instances"]
    cluster = Cluster("aws", environment={"AWS_DEFAULT_REGION": REGION}, facts={"file": "aws.yaml"})
    state.save(cluster)
    with pytest.raises(
        UserError, match=f"are left, and cost: .*--region {REGION} --instance-ids {machine['InstanceId']}"
    ):
        aws.down(cluster)
    assert state.load() == cluster

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no AWS credentials"):
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        aws.down(cluster)
    assert state.load() == cluster, "nobody could look"

    ec2.terminate_instances(InstanceIds=[machine["InstanceId"]])
    aws.down(cluster)
    assert state.load() is None


def test_another_account_does_not_end_it(account, monkeypatch):
    """Ray's launcher finds no machines there, and says that it is done; the cluster's go on costing."""
    asked = []
    monkeypatch.setattr(launcher, "ray", lambda words: bool(asked.append(words)))
    own = account.client("sts").get_caller_identity()["Account"]
    facts = {"file": "aws.yaml", "place": {"account": own, "region": REGION}}
    cluster = Cluster("aws", environment={"AWS_DEFAULT_REGION": REGION}, facts=facts)
    state.save(cluster)
    role = {"RoleArn": "arn:aws:iam::111122223333:role/colleague", "RoleSessionName": "colleague"}
    theirs = account.client("sts").assume_role(**role)["Credentials"]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", theirs["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", theirs["SecretAccessKey"])
        patch.setenv("AWS_SESSION_TOKEN", theirs["SessionToken"])
        with pytest.raises(UserError, match=f"is in account {own}, .* of account 111122223333: set AWS_PROFILE"):
            aws.down(cluster)
    assert state.load() == cluster and not asked

    aws.down(cluster)
    assert state.load() is None and [words[0] for words in asked] == ["exec", "down"]


SECRETS = ("cluster/docker/.env", "cluster/docker/.env.old", "watch/serve.token", "monday/mlflow.db", "scans/1.dcm")
SECRETS += (".env", ".git-credentials", "raymed/.env", "raymed/tasks/ours/a.png", "raymed/tasks/bundle.key")
CODE = ("LICENSE", "README.md", "cluster/node.sh", "pyproject.toml", "raymed/__init__.py", "raymed/serve/page/app.js")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with code, and with what is nobody else's business."""
    folder = tmp_path / "project"
    for name in (*SECRETS, *CODE, "raymed/__pycache__/x.pyc", "raymed.egg-info/SOURCES.txt", "jobs/train.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(launcher.PROJECT / name, folder)
    (folder / "raymed" / "tasks" / "ours" / ".gitignore").write_text("*\n")
    (folder / "raymed" / "link").symlink_to(folder / "scans")
    (folder / "raymed" / "link.dcm").symlink_to(folder / "scans" / "1.dcm")
    monkeypatch.setattr(launcher, "PROJECT", folder)
    return folder


def test_machines_get_code_alone(on_google, project):
    content = yaml.safe_load(launcher.written(on_google()).read_text())
    copy = Path(content["file_mounts"]["~/raymed"])
    assert copy.is_relative_to(state.folder())
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if not path.is_dir()) == sorted(CODE)
    assert (copy / "cluster/node.sh").read_text() == "cluster/node.sh"

    (project / "raymed" / "__init__.py").unlink()
    (project / "raymed" / "new.py").touch()
    launcher.written(on_google())
    assert (copy / "raymed" / "new.py").is_file() and not (copy / "raymed" / "__init__.py").exists()


def test_the_way_in_needs_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="session-manager-plugin is not on this machine's PATH.*plugin"):
        launcher.need("session-manager-plugin", by={"session-manager-plugin": "AWS's plugin"})


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
