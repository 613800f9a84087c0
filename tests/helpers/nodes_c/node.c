// A custom node for the tests: y FP32 [-1,-1] = x FP32 [-1,2] + the param "add". The param "mode" names a way to fail;
// with the param "precision", tensors have that precision and are copied.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct CustomNodeTensor {
    const char* name;
    uint8_t* data;
    uint64_t dataBytes;
    uint64_t* dims;
    uint64_t dimsCount;
    int precision;
};
struct CustomNodeTensorInfo {
    const char* name;
    uint64_t* dims;
    uint64_t dimsCount;
    int precision;
};
struct CustomNodeParam {
    const char *key, *value;
};

#ifdef FINDS_ITSELF
int dladdr(const void* address, void* info);
int find_itself(void* info) {
    return dladdr((void*)&find_itself, info);
}
#endif

// Read by the tests.
int allocated = 0, released = 0, initialized = 0;

static const char* find(const char* key, const struct CustomNodeParam* params, int count) {
    for (int i = 0; i < count; i++)
        if (strcmp(params[i].key, key) == 0)
            return params[i].value;
    return "";
}

#define MODE(name) (strcmp(find("mode", params, paramsCount), name) == 0)

static void* make(size_t size) {
    allocated++;
    return calloc(1, size);
}

#ifdef WITH_DEINITIALIZE
int deinitialize(void* manager) {
    free(manager);
    return 0;
}
#endif

int initialize(void** manager, const struct CustomNodeParam* params, int paramsCount) {
    initialized++;
    if (MODE("crash in initialize"))
        abort();
    if (MODE("exit in initialize"))
        _exit(0);
    if (MODE("hang in initialize"))
        for (;;)
            pause();
    if (MODE("initialize fails"))
        return 3;
    float* add = malloc(sizeof(float));
    *add = atof(find("add", params, paramsCount));
    *manager = add;
    return 0;
}

static int read_precision(const struct CustomNodeParam* params, int paramsCount) {
    int precision = atoi(find("precision", params, paramsCount));
    return precision ? precision : 1;
}

static void fill(struct CustomNodeTensorInfo* info, const char* name, uint64_t first, uint64_t second) {
    info->name = name;
    info->dims = make(2 * sizeof(uint64_t));
    info->dims[0] = first;
    info->dims[1] = second;
    info->dimsCount = 2;
    info->precision = 1;
}

int getInputsInfo(struct CustomNodeTensorInfo** info, int* infoCount, const struct CustomNodeParam* params, int paramsCount, void* manager) {
    *info = make(sizeof(struct CustomNodeTensorInfo));
    *infoCount = 1;
    fill(*info, "x", 0, 2);
    (*info)->precision = read_precision(params, paramsCount);
    return 0;
}

int getOutputsInfo(struct CustomNodeTensorInfo** info, int* infoCount, const struct CustomNodeParam* params, int paramsCount, void* manager) {
    if (MODE("info: crash"))
        *(volatile int*)8 = 0;
    if (MODE("info: fails"))
        return 4;
    *infoCount = 1;
    if (MODE("info: null"))
        return 0;
    struct CustomNodeTensorInfo* made = *info = make(2 * sizeof(struct CustomNodeTensorInfo));
    fill(made, "y", 0, 0);
    made->precision = read_precision(params, paramsCount);
    if (MODE("info: none"))
        *infoCount = 0;
    if (MODE("info: too many"))
        *infoCount = 1 << 30;
    if (MODE("info: no name"))
        made->name = NULL;
    if (MODE("info: not UTF-8"))
        made->name = "\xff";
    if (MODE("info: unspecified"))
        made->precision = 0;
    if (MODE("info: null dims")) {
        free(made->dims);
        made->dims = NULL;
    }
    if (MODE("info: no dims"))
        made->dimsCount = 0;
    if (MODE("info: too many dims"))
        made->dimsCount = 1ull << 62;
    if (MODE("info: too large"))
        made->dims[1] = 1ull << 63;
    if (MODE("info: twice")) {
        fill(made + 1, "y", 0, 0);
        *infoCount = 2;
    }
    return 0;
}

int execute(const struct CustomNodeTensor* inputs, int inputsCount, struct CustomNodeTensor** outputs, int* outputsCount, const struct CustomNodeParam* params, int paramsCount, void* manager) {
    if (MODE("crash") || (MODE("crash below 0") && *(const float*)inputs->data < 0))
        *(volatile int*)8 = 0;
    if (MODE("fails"))
        return 5;
    *outputsCount = 1;
    if (MODE("null"))
        return 0;
    if (inputsCount != 1 || strcmp(inputs->name, "x") || inputs->precision != read_precision(params, paramsCount) || inputs->dimsCount != 2)
        return 6;
    struct CustomNodeTensor* made = *outputs = make(2 * sizeof(struct CustomNodeTensor));
    uint64_t count = inputs->dataBytes / sizeof(float);
    made->name = "y";
    made->dims = make(2 * sizeof(uint64_t));
    memcpy(made->dims, inputs->dims, 2 * sizeof(uint64_t));
    made->dimsCount = 2;
    made->dataBytes = inputs->dataBytes;
    made->data = make(made->dataBytes);
    made->precision = inputs->precision;
    memcpy(made->data, inputs->data, inputs->dataBytes);
    for (uint64_t i = 0; i < count && made->precision == 1; i++)
        ((float*)made->data)[i] = ((const float*)inputs->data)[i] + *(float*)manager;
    if (MODE("none"))
        *outputsCount = 0;
    if (MODE("too many"))
        *outputsCount = 1 << 30;
    if (MODE("no name"))
        made->name = NULL;
    if (MODE("other name"))
        made->name = "z";
    if (MODE("unspecified"))
        made->precision = 0;
    if (MODE("other precision"))
        made->precision = 7;
    if (MODE("null dims")) {
        free(made->dims);
        made->dims = NULL;
        allocated--;
    }
    if (MODE("no dims"))
        made->dimsCount = 0;
    if (MODE("too many dims"))
        made->dimsCount = 1ull << 62;
    if (MODE("one dim"))
        made->dimsCount = 1;
    if (MODE("too few bytes"))
        made->dataBytes--;
    if (MODE("null data")) {
        free(made->data);
        made->data = NULL;
        allocated--;
    }
    if (MODE("no memory")) {
        made->dims[0] = 1ull << 40;
        made->dims[1] = 1ull << 20;
        made->dataBytes = 1ull << 62;
    }
    if (MODE("nothing found")) {
        made->dims[0] = 0;
        made->dataBytes = 0;
    }
    if (MODE("twice")) {
        made[1] = made[0];
        made[1].dims = make(2 * sizeof(uint64_t));
        memcpy(made[1].dims, made->dims, 2 * sizeof(uint64_t));
        made[1].data = make(made->dataBytes);
        *outputsCount = 2;
    }
    if (MODE("one more")) {
        made[1].name = "more";  // and nothing else in it
        *outputsCount = 2;
    }
    return 0;
}

int release(void* pointer, void* manager) {
    free(pointer);
    released++;
    return 0;
}
