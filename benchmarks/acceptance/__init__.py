"""What `benchmarks/gpu_acceptance.py` starts and checks: configurations of SGLang, and the parts of each."""
