/* The CUDA ops from plain C99: two rows times weights of bfloat16 on a GPU, without a CUDA toolkit.
 *
 *   cc -std=c99 -Icsrc/include tests/native/example_cuda.c <fastloop_core> -lstdc++ -lpthread -ldl -lm
 *   python -m fastloop.ops.cuda_images linear --out linear.cubin && ./a.out linear.cubin
 *
 * Without a driver, or without an image, it says so. A host that links CUDA has its own memory and stream; here the few
 * functions of the driver that this takes are looked up.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastloop_cuda.h"

enum { ROWS = 2, INPUTS = 192, OUTPUTS = 40, MOST = 1 << 22 };

static void must(fastloop_status status) {
    if (status == FASTLOOP_OK) return;
    fprintf(stderr, "%s\n", fastloop_last_error());
    exit(1);
}

static uint16_t narrow(float value) { /* to bfloat16; these numbers are exact in it */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}
static float widen(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* Memory that host and device share, and the end of all work: of the driver that the library uses. */
typedef struct memory {
    int (*allocate)(uint64_t* address, size_t bytes, unsigned flags);
    int (*synchronize)(void);
} memory;

static memory open_memory(void) {
    const char* path = getenv("FASTLOOP_LIBCUDA");
    void* library = dlopen(path != NULL && path[0] != '\0' ? path : "libcuda.so.1", RTLD_NOW);
    int (*retain)(void** context, int device);
    int (*push)(void* context);
    void* context = NULL;
    memory m;
    if (library == NULL) exit(1);
    /* ISO C has no cast from an object to a function pointer; POSIX has this. */
    *(void**)&m.allocate = dlsym(library, "cuMemAllocManaged");
    *(void**)&m.synchronize = dlsym(library, "cuCtxSynchronize");
    *(void**)&retain = dlsym(library, "cuDevicePrimaryCtxRetain");
    *(void**)&push = dlsym(library, "cuCtxPushCurrent_v2");
    if (m.allocate == NULL || m.synchronize == NULL || retain == NULL || push == NULL) exit(1);
    if (retain(&context, 0) != 0 || push(context) != 0) exit(1);
    return m;
}

static void* shared(const memory* m, size_t bytes) {
    uint64_t address = 0;
    if (m->allocate(&address, bytes, 1) != 0) exit(1);
    memset((void*)(uintptr_t)address, 0, bytes);
    return (void*)(uintptr_t)address;
}

static void* read_file(const char* path, size_t* bytes) {
    FILE* file = fopen(path, "rb");
    char* content = malloc(MOST);
    if (file == NULL || content == NULL) {
        fprintf(stderr, "%s cannot be read\n", path);
        exit(1);
    }
    memset(content, 0, MOST);
    *bytes = fread(content, 1, MOST, file);
    fclose(file);
    return content;
}

/* The largest error of out [2, 40] against the same sum on the host; all numbers are small integers, so it is 0. */
static double multiply(fastloop_cuda_module* module, const memory* m) {
    fastloop_cuda_linear_params p;
    uint16_t *x, *weight, *out;
    size_t workspace = 0;
    double most = 0;
    x = shared(m, ROWS * INPUTS * sizeof *x);
    weight = shared(m, OUTPUTS * INPUTS * sizeof *weight);
    out = shared(m, ROWS * OUTPUTS * sizeof *out);
    for (int i = 0; i < ROWS * INPUTS; ++i) x[i] = narrow((float)(i % 3 - 1));
    for (int i = 0; i < OUTPUTS * INPUTS; ++i) weight[i] = narrow((float)(i % 5 - 2) / 4);
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.module = module;
    p.rows = ROWS;
    p.in = INPUTS;
    p.out_rows = OUTPUTS;
    p.x = x;
    p.x_stride = INPUTS;
    p.weight = weight;
    p.weight_stride = INPUTS;
    p.out = out;
    p.out_stride = OUTPUTS;
    must(fastloop_cuda_linear_workspace(&p, &workspace));
    if (workspace > 0) p.workspace = shared(m, workspace);
    p.workspace_bytes = workspace;
    must(fastloop_cuda_linear(&p));
    if (m->synchronize() != 0) exit(1);
    for (int n = 0; n < ROWS; ++n)
        for (int o = 0; o < OUTPUTS; ++o) {
            double want = 0;
            for (int i = 0; i < INPUTS; ++i) want += (double)widen(x[n * INPUTS + i]) * widen(weight[o * INPUTS + i]);
            const double off = fabs(widen(out[n * OUTPUTS + o]) - want);
            if (!(off <= most)) most = off;
        }
    return most;
}

int main(int count, char** values) {
    fastloop_cuda_device device;
    fastloop_cuda_module_params image;
    fastloop_cuda_module* module = NULL;
    memory m;
    int32_t devices = 0;
    double error;
    if (fastloop_abi_version() != FASTLOOP_ABI_VERSION || fastloop_abi_minor() < FASTLOOP_ABI_MINOR) return 1;
    if (fastloop_cuda_device_count(&devices) == FASTLOOP_UNSUPPORTED || devices == 0) {
        printf("%s\n", devices == 0 && fastloop_last_error()[0] != '\0' ? fastloop_last_error() : "no GPU");
        return 0;
    }
    memset(&device, 0, sizeof device);
    device.struct_size = sizeof device;
    must(fastloop_cuda_describe(0, &device));
    printf("%s: sm_%d%d, %d processors\n", device.name, device.major, device.minor, device.processors);
    if (count < 2) {
        printf("no image: name a cubin of csrc/cuda/linear.cu\n");
        return 0;
    }
    memset(&image, 0, sizeof image);
    image.struct_size = sizeof image;
    image.image = read_file(values[1], &image.image_bytes);
    must(fastloop_cuda_module_create(&image, &module));
    m = open_memory();
    error = multiply(module, &m);
    fastloop_cuda_module_destroy(module);
    printf("largest error of the product: %g\n", error);
    return error == 0 ? 0 : 1;
}
