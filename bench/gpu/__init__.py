"""The sections of bench/gpu_check.py, one file each: `run(context, record)` measures and records."""
