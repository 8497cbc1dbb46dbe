"""A dense decoder as one compiled call per step, for CPUs with AVX-512. Reading order: kernels.cpp, build, structs, weights, model."""
