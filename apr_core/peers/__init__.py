"""One adapter per foreign runtime, for parity and benchmarks; absent packages are reported, never imagined."""
