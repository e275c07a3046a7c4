"""One check in a process of its own: its name is the argument, the place comes by stdin, the finding goes to stdout."""

import json
import os
import sys

from raymed.config import UserError, from_dict, to_json
from raymed.doctor.checks import CHECKS, Check
from raymed.doctor.finding import Finding, failure
from raymed.doctor.place import Place
from raymed.telemetry import telemetry_off

_AGAIN = "python -m raymed.doctor --only '{name}' repeats this check alone"


def look(check: Check, place: Place) -> Finding:
    """What a check finds. A UserError is a finding that holds its own remedy; any other error is one too."""
    try:
        return check.look(place)
    except UserError as error:
        found, colon, remedy = str(error).rpartition(": ")
        return failure(found, remedy) if colon else failure(remedy, _AGAIN.format(name=check.name))
    except Exception as error:  # what a check did not think of is for people to read
        return failure(f"{type(error).__name__}: {error}"[:500], _AGAIN.format(name=check.name))


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the answer
    telemetry_off()
    chosen = next(check for check in CHECKS if check.name == sys.argv[1])
    answer.write(to_json(look(chosen, from_dict(Place, json.load(sys.stdin)))))
    answer.close()
