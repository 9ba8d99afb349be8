"""The files of OUTPUT: run record, manifest, ledger, lease, data."""
