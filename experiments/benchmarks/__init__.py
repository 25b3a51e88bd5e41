"""The benchmarks that results/benchmarks reports, such as `python -m experiments.benchmarks.scoring`."""
