"""What ``benchmarks/compare_llama_cpp.py`` consists of."""
