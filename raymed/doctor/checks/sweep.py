"""Whether planned trainings have room, by the rule that sweeps themselves go by."""

from raymed.doctor.finding import Finding, ok, warning
from raymed.doctor.place import Place

_ADVICE = "lower --workers, --cpus-per-worker or --gpus-per-worker, or add nodes"


def fits(place: Place) -> Finding:
    """As many trainings as asked for are placed, on the cluster or on the Ray that a job would start here."""
    from raymed.train.places.cluster import connected, require

    plan = place.sweep
    with connected():
        room = require(
            plan.cpus_per_worker, plan.gpus_per_worker, workers=plan.workers, at_most=plan.trials, advice=_ADVICE
        )
    each = f"{plan.workers} worker(s) of {plan.cpus_per_worker} CPUs and {plan.gpus_per_worker:g} GPUs"
    if room < plan.trials:
        found = f"{room} of {plan.trials} trainings with {each} run at a time, the others wait for their turn"
        return warning(found, f"nothing, if that is quick enough; else {_ADVICE}")
    return ok(f"{plan.trials} trainings with {each} run at a time")
