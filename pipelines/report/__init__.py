"""The result of a run as one HTML page: counted in one pass, some of its rows shown with their media."""
