"""raymed trains, tunes and serves medical vision models on a Ray cluster.

Importing the package costs next to nothing: torch, Ray, DeepSpeed and MLflow are imported by the parts that use them.
"""

import os

from raymed import _torchvision

__version__ = "0.1.0"

# Read when torch loads OpenMP. Threads that spin while they wait make trainings that share cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_torchvision.install()
