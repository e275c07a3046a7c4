"""What a person does with a model that a job has registered: the commands, ready to be copied."""

import json
import shlex
from pathlib import Path

from raymed.registry.config import RegisterConfig


def tell_next_steps(
    summary: Path, config: RegisterConfig, storage: str | None = None, tracking: str | None = None
) -> None:
    """Print which version a job has registered, by its summary, how it comes into use and how it is served; nothing
    where the job has registered none.

    config, storage, tracking: what the job was told.
    """
    registered = json.loads(summary.read_text()).get("registered")
    if not registered:
        return
    name, version, is_champion = (registered[key] for key in ("name", "version", "is_champion"))
    use = config.intended_use if config.is_stated else "..."
    promote = ["promote_model", "--model", name, "--version", str(version), "--intended-use", use]
    what = "put it into use, saying on whom, by whom and for which decision"
    if other := registered.get("other_champion"):
        promote += ["--gate.manifest", "TEST.csv"]
        what += f", where it is no worse than version {other} on images that neither has seen"
    steps = [] if is_champion else [(what, promote)]
    steps += [("serve it on this machine, at http://127.0.0.1:8000/", ["serve_models", "--access.open"])]
    where = {"--storage": storage, "--tracking": tracking}
    place = [word for flag, value in where.items() if value for word in (flag, value)]
    print(f"\nregistered: {name} version {version}, {'champion' if is_champion else 'candidate'}")
    for what, (job, *words) in steps:
        print(f"{what}:\n    python jobs/{job}.py {shlex.join([*words, *place])}")
