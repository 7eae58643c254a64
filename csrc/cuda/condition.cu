// The condition of a WHILE node (CUDA 12.4 and newer): the loop's body ends with this kernel, which hands the node what
// the body has left in memory, so that the device decides whether it goes round again and no host is asked.
//
// One thread reads 4 bytes and calls the device runtime; a cubin with that call needs no library beside it.
#ifdef __CUDACC_RTC__  // nvcc knows these from the headers that it includes by itself
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle handle,
                                                                      unsigned int value);
#endif

extern "C" __global__ void fastloop_condition(cudaGraphConditionalHandle handle, const int* condition) {
    cudaGraphSetConditional(handle, *condition != 0 ? 1u : 0u);
}
