"""Five whys found by experiment: from a failure to its cause, each step a measurement, the last one a repair."""
