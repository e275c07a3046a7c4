"""What importing costs and drags in; each in a process of its own."""

import subprocess
import sys

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "pandas", "matplotlib")


def run(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_quick_and_light():
    code = f"""
import sys, time
start = time.perf_counter()
import raymed
print(time.perf_counter() - start, *(name for name in {HEAVY} if name in sys.modules))
"""
    runs = [run(code).split() for _ in range(3)]
    assert all(len(words) == 1 for words in runs), runs
    assert sorted(float(words[0]) for words in runs)[1] < 0.5


def test_parts_import_without_the_cluster_stack():
    """A loss in any script, and the classifier where Ray, DeepSpeed and MLflow are not installed."""
    code = """
import sys
blocked = ("ray", "deepspeed", "mlflow")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from raymed.losses import AsymmetricLoss
import torch
print(AsymmetricLoss()(torch.zeros(2), torch.ones(2)).item() > 0)
import raymed.tasks.classifier, raymed.train.loop, raymed.train.unit, raymed.bundle
import timm, torchvision  # beside whatever torch is installed
print(timm.create_model("resnet10t", num_classes=0).eval()(torch.zeros(1, 3, 32, 32)).shape[0])
"""
    assert run(code) == "True\n1"


def test_losses_do_not_load_what_is_installed():
    code = "import sys; import raymed.losses; print({'ray', 'mlflow', 'deepspeed'} & {*sys.modules})"
    assert run(code) == "set()"
