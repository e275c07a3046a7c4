"""What is wrong with a machine or a cluster, before a job finds out: python -m raymed.doctor.

A check does what a job would do and says what came of it. `checks` has a module for each area, `runner` gives every
check a process and a time limit of its own, `there` is what runs on the nodes of a cluster.
"""
