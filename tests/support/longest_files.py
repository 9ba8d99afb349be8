"""The test files that processes take first."""

# Those that take longer than 15 s, longest first: what is begun last is short, so that all processes end together.
LONGEST = (
    "test_resume",
    "test_end_to_end",
    "test_parallel",
    "test_video_job",
    "test_job_submit",
    "test_annotate",
    "test_chaos",
    "test_conservation",
    "test_shards",
    "test_retry_and_extend",
    "test_cluster_run",
    "test_object_store",
    "test_store_faults",
    "test_constraints",
)
