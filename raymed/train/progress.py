"""What a person sees of a training: a line an evaluation, and at the end of a phase where its time went."""

from collections import Counter
from collections.abc import Callable, Sequence

from raymed.ledger import describe
from raymed.train.loop import Evaluation


def show_progress(name: str, shown: Sequence[str]) -> Callable[[Evaluation], None]:
    """Prints the evaluations that it is called with, those of one training in order. shown: metrics, of those that a
    phase has; all of them where it has none of these."""
    spent: Counter[str] = Counter()

    def show(e: Evaluation) -> None:
        told = {metric: e.metrics[metric] for metric in shown if metric in e.metrics} or e.metrics
        metrics = "  ".join(f"{metric} {value:.3f}" for metric, value in told.items())
        minutes, seconds = divmod(round(e.seconds_left), 60)
        speed = f"{e.samples_per_second:6.0f} images/s  {minutes}:{seconds:02d} left"
        print(f"{name}  {e.phase:7s} step {e.step:5d}  loss {e.loss:.4f}  {metrics}  {speed}", flush=True)
        spent.update(e.seconds)
        if not e.seconds_left:
            print(f"{name}  {e.phase:7s} time: {describe(dict(spent))}", flush=True)
            spent.clear()

    return show
