"""Many runs in, the best one and the Pareto front out."""
