"""The peer without raymed that gives every training a Ray Train run of its own, with one worker.

    python ray_train_heads.py PROBLEM.npz FOLDER

Prints a line of JSON when Ray has started, {"start_seconds": ...}. For every line "SEED CONFIGURATION" that it then
reads, it trains that head of the problem (see plain_heads.py) and prints {"seconds": ..., "weights": [...]}.
"""

import json
import logging
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()


def worker(settings: dict) -> None:
    """One head in a Ray Train worker; its weights go into a file."""
    import numpy as np
    from plain_heads import Problem, train_head

    weights = train_head(Problem(Path(settings["problem"])), settings["seed"], settings["configuration"])
    np.save(settings["out"], weights.numpy())


def main(problem: Path, folder: Path) -> None:
    """Serve trainings until the input ends."""
    import numpy as np
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    say({"start_seconds": time.perf_counter() - STARTED})
    for line in sys.stdin:
        seed, configuration = map(int, line.split())
        out = folder / f"{seed}-{configuration}.npy"
        began = time.perf_counter()
        settings = {"problem": str(problem), "seed": seed, "configuration": configuration, "out": str(out)}
        run = RunConfig(name=f"{seed}-{configuration}-{time.time_ns()}", storage_path=str(folder))
        TorchTrainer(
            worker, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=1), run_config=run
        ).fit()
        say({"seconds": time.perf_counter() - began, "weights": np.load(out).tolist()})


def say(message: dict) -> None:
    """A line on the standard output."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
