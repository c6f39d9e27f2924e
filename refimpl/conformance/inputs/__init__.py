"""What kernels are fed: drawn numbers, weights in every format, memory layouts, enumerated products."""
