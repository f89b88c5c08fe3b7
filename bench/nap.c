/* What the machine itself adds: naps of 10 ms, one after the other, and how much too long the longest was.
 *
 *   nap SECONDS
 *
 * It computes nothing, so whatever it oversleeps it has waited for a core: others had them, or the hypervisor. A process
 * that computes waits at least as long, as the scheduler prefers those that have slept. Prints one line of JSON:
 * the number of naps, the longest oversleep and the 99th percentile of all in milliseconds.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define NAP 0.010

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    double end = now() + atof(argv[1]);
    size_t count = 0, room = (size_t)(atof(argv[1]) / NAP) + 2;
    double *over = calloc(room, sizeof *over);
    while (count < room && now() < end) {
        struct timespec nap = {.tv_nsec = (long)(NAP * 1e9)};
        double began = now();
        nanosleep(&nap, NULL);
        over[count++] = now() - began - NAP;
    }
    if (!count) return 1;
    qsort(over, count, sizeof *over, ascending);
    printf("{\"naps\": %zu, \"nap_ms\": %.3f, \"nap_p99_ms\": %.3f}\n", count, over[count - 1] * 1e3,
           over[count * 99 / 100] * 1e3);
    return 0;
}
