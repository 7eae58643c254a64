"""GPU kernels in Triton, one file per op; installed as `fastloop.triton_kernels`.

    launch.py     how a kernel is started: devices, dtypes, programmatic dependent launch, recording
    device.py     what several kernels share on the device: products, rounding, activations
    tuning.py     block sizes: data files of tables/, chosen by the device's name
    resources.py  registers, spills and shared memory of every launch of the 3B model, without a GPU
    <op>.py       the kernel of fastloop/ops/<op>.py and `<op>_triton`, which has the op's contract

Nothing here is imported before an op of backend "triton" is called. With TRITON_INTERPRET=1 in the
environment at that moment the kernels run on CPU tensors, slowly: that is how they are tested without a GPU.
"""
