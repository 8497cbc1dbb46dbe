"""vLLM behind the engine's seam: a Ray actor in a Python environment of its own computes, this process admits and streams."""
