"""A job: its members, stored results, groups, schedule and store, changed by records only. No clock, no threads."""

from optserve.server.jobs.job import Job

__all__ = ["Job"]
