"""sgl_apr/evaluation/benchmarks"""
