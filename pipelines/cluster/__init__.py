"""The Ray cluster that a run uses: its resources, the session, attempts per row and how actors end."""
