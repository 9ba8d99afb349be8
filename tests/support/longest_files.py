"""Test files that run first when several processes share the tests."""

# Files that take longer than 15 s, longest first: short files come last, so that all processes end together.
LONGEST = (
    "test_resume",
    "test_end_to_end",
    "test_parallel",
    "test_video_job",
    "test_job_submit",
    "test_annotate",
    "test_evaluate_run",
    "test_chaos",
    "test_conservation",
    "test_shards",
    "test_retry_and_extend",
    "test_cluster_run",
    "test_object_store",
    "test_store_faults",
    "test_readme",
    "test_examples",
    "test_constraints",
)
