"""Where raymed runs: clusters that are brought up, watched, used and taken down with one command each.

    python -m raymed.cluster up local | status | submit jobs/tune_asl.py --flags | logs | stop | down

`providers/` has a module for each place; `state` is what this machine remembers of the cluster that it uses.
"""
