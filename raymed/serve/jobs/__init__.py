"""Long work: asked for in one request, done beside the others, fetched later.

    POST -> a row of jobs.sqlite -> the thread of jobs, one at a time -> files of the job -> GET .../result

Everything that is known of a job stands in the storage: a server that ends in the middle goes on with it when it starts
again. Servers may share a storage: each works off the jobs of the models that it serves itself, one server at a time
those of a model, so that replicas take over from each other; and all of them tell of all jobs. The job of a folder,
once begun, is taken over by those alone who have the key of its pseudonyms: give the servers of a storage one key.

    store    the rows
    runner   the thread that works them off
    outages  which of them wait for something that is gone, such as a share
    predict  the work of a prediction over a folder or a manifest; another kind is another such file, in runner's KINDS
    files    its images, read as those of requests are
"""

from raymed.serve.jobs.runner import KINDS, Jobs
from raymed.serve.jobs.store import Job, State

__all__ = ["KINDS", "Job", "Jobs", "State"]
