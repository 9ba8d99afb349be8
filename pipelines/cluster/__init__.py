"""What a run needs of Ray: hardware and pools, the session, attempts per row, the end of actors."""
