/* Small requests under load: one keep-alive connection, one request at a time, how long each answer took.
 *
 *   probe HOST PORT PATH SECONDS INTERVAL_MS
 *
 * Prints one JSON line with the number of answers and p50, p99 and the maximum in milliseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b) {
    double x = *(double *)a, y = *(double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, count = 0;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (void *)&to, sizeof to)) return 1;
    char ask[512], got[8192];
    int length = snprintf(ask, sizeof ask, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", argv[3]);
    double end = now() + atof(argv[4]);
    static double waits[1000000];
    while (now() < end && count < 1000000) {
        double start = now();
        if (send(fd, ask, length, MSG_NOSIGNAL) != length) return 1;
        int n = 0;
        char *body = 0;
        for (;;) {
            int r = recv(fd, got + n, sizeof got - 1 - n, 0);
            if (r <= 0) return 1;
            n += r;
            got[n] = 0;
            if (!(body = strstr(got, "\r\n\r\n"))) continue;
            char *size = strcasestr(got, "\r\ncontent-length:");
            if (strncmp(got + 9, "200", 3) || !size) return 1;
            if (got + n >= body + 4 + atoi(size + 17)) break;
        }
        waits[count++] = now() - start;
        usleep(atoi(argv[5]) * 1000);
    }
    qsort(waits, count, sizeof *waits, ascending);
    printf("{\"answers\": %d, \"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f}\n", count, waits[count / 2] * 1e3,
           waits[count * 99 / 100] * 1e3, waits[count - 1] * 1e3);
    return 0;
}
