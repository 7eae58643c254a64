"""GPU kernels in Triton, one file per op; installed as `fastloop.triton_kernels`."""
