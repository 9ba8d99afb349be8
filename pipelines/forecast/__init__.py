"""Say before a run what is there, what limits it and what it costs: `forecast.forecast.make_forecast`."""
