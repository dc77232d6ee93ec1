/* A stand-in for the driver's libnvidia-ml.so.1: one card, whose answers stand in the text file that MEFT_NVML_STUB names.

   Each line is a key and numbers; the file is read again at every call, so a test changes the card while it is in use.
   Keys: "process PID BYTES" (any number of lines), "memory TOTAL FREE USED", "counters TX RX", "counter_type N",
   "throughput TX RX" (KB/s), "pcie GENERATION MAX_GENERATION WIDTH MAX_WIDTH", "reasons MASK", "cards N", and
   "fail FUNCTION CODE", where FUNCTION is a name below without "nvmlDevice" or "nvml". Compiled with -DDRIVER_V2 it lacks the
   third version of the process list, as drivers before R510 do. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { UNSIGNED_INT = 1, TX_BYTES = 197, RX_BYTES = 198, LINES = 64, WIDTH = 256 };

typedef struct { unsigned int pid; unsigned long long bytes; unsigned int gpu, compute; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef union { double d; unsigned int ui; unsigned long long ull; } Value;
typedef struct { uint32_t field, scope; int64_t timestamp, latency; unsigned int type; int code; Value value; } FieldValue;

static int card;

static int read_lines(char lines[LINES][WIDTH]) {
    const char *path = getenv("MEFT_NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    int count = 0;
    if (!file) return 0;
    while (count < LINES && fgets(lines[count], WIDTH, file)) count++;
    fclose(file);
    return count;
}

/* Up to four numbers of the first line of that key; 0 where there is none. */
static int numbers(const char *key, unsigned long long found[4]) {
    char lines[LINES][WIDTH], name[WIDTH];
    int count = read_lines(lines);
    memset(found, 0, 4 * sizeof *found);
    for (int i = 0; i < count; i++)
        if (sscanf(lines[i], "%s %llu %llu %llu %llu", name, found, found + 1, found + 2, found + 3) > 1 && !strcmp(name, key))
            return 1;
    memset(found, 0, 4 * sizeof *found);
    return 0;
}

static int failing(const char *function) {
    char lines[LINES][WIDTH], name[WIDTH], word[WIDTH];
    int count = read_lines(lines), code;
    for (int i = 0; i < count; i++)
        if (sscanf(lines[i], "%s %s %d", word, name, &code) == 3 && !strcmp(word, "fail"))
            if (!strcmp(name, function) || !strcmp(name, "*")) return code;
    return SUCCESS;
}

static int one_number(const char *function, const char *key, int place, unsigned int *answer) {
    unsigned long long found[4];
    numbers(key, found);
    *answer = (unsigned int)found[place];
    return failing(function);
}

static int processes(unsigned int *room, Process *list) {
    char lines[LINES][WIDTH], word[WIDTH];
    int count = read_lines(lines), code = failing("GetComputeRunningProcesses");
    unsigned int found = 0, pid;
    unsigned long long bytes;
    if (code) return code;
    for (int i = 0; i < count; i++) {
        if (sscanf(lines[i], "%s %u %llu", word, &pid, &bytes) != 3 || strcmp(word, "process")) continue;
        if (found < *room) list[found] = (Process){pid, bytes, ~0u, ~0u};
        found++;
    }
    code = found > *room ? INSUFFICIENT_SIZE : SUCCESS;
    *room = found;
    return code;
}

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return failing("Init"); }
int nvmlShutdown(void) { return failing("Shutdown"); }
const char *nvmlErrorString(int code) { (void)code; return "an error that pynvml does not know"; }

int nvmlDeviceGetCount_v2(unsigned int *count) {
    unsigned long long found[4];
    *count = numbers("cards", found) ? (unsigned int)found[0] : 1;
    return failing("GetCount");
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
    *handle = &card;
    return index ? NOT_FOUND : failing("GetHandleByIndex");
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = &card;
    return strcmp(uuid, "GPU-1111-2222") ? NOT_FOUND : failing("GetHandleByUUID");
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) {
    *handle = &card;
    return strcmp(bus, "00000000:65:00.0") ? NOT_FOUND : failing("GetHandleByPciBusId");
}

int nvmlDeviceGetName(void *handle, char *name, unsigned int length) {
    (void)handle;
    snprintf(name, length, "NVIDIA Stub 24GB");
    return failing("GetName");
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    unsigned long long found[4];
    (void)handle;
    numbers("memory", found);
    *memory = (Memory){found[0], found[1], found[2]};
    return failing("GetMemoryInfo");
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned int *room, Process *list) {
    (void)handle;
    return processes(room, list);
}

#ifndef DRIVER_V2
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *room, Process *list) {
    (void)handle;
    return processes(room, list);
}
#endif

int nvmlDeviceGetFieldValues(void *handle, int count, FieldValue *values) {
    unsigned long long bytes[4], type[4];
    (void)handle;
    numbers("counters", bytes);
    for (int i = 0; i < count; i++) {
        unsigned long long now = bytes[values[i].field == RX_BYTES];
        values[i].type = numbers("counter_type", type) ? (unsigned int)type[0] : UNSIGNED_INT;
        values[i].code = failing("FieldValue");
        if (values[i].type == UNSIGNED_INT) values[i].value.ui = (unsigned int)now;
        else values[i].value.ull = now;
    }
    return failing("GetFieldValues");
}

int nvmlDeviceGetPcieThroughput(void *handle, unsigned int way, unsigned int *kilobytes) {
    (void)handle;
    return one_number("GetPcieThroughput", "throughput", (int)way, kilobytes);
}

int nvmlDeviceGetCurrPcieLinkGeneration(void *handle, unsigned int *answer) {
    (void)handle;
    return one_number("GetCurrPcieLinkGeneration", "pcie", 0, answer);
}

int nvmlDeviceGetMaxPcieLinkGeneration(void *handle, unsigned int *answer) {
    (void)handle;
    return one_number("GetMaxPcieLinkGeneration", "pcie", 1, answer);
}

int nvmlDeviceGetCurrPcieLinkWidth(void *handle, unsigned int *answer) {
    (void)handle;
    return one_number("GetCurrPcieLinkWidth", "pcie", 2, answer);
}

int nvmlDeviceGetMaxPcieLinkWidth(void *handle, unsigned int *answer) {
    (void)handle;
    return one_number("GetMaxPcieLinkWidth", "pcie", 3, answer);
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *mask) {
    unsigned long long found[4];
    (void)handle;
    numbers("reasons", found);
    *mask = found[0];
    return failing("GetCurrentClocksEventReasons");
}
