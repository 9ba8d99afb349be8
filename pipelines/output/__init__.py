"""OUTPUT on disk or in a store: run record, manifest, ledger, lease and data files."""
