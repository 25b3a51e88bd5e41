"""The Hydra application, its report and its benchmarks."""
