"""The files of OUTPUT: run record, manifest, ledger, lease and data."""
