"""Parts of the benchmark of the choice of the step."""
