/* How long a newcomer waits for the first byte of its download.
 *
 *   first_byte HOST PORT PATH SIZE SECONDS INTERVAL_MS [HEADER...]
 *
 * Again and again: a new connection, GET PATH, and the clock runs from before the connection is opened until a byte of
 * the body is there. Status and Content-Length (SIZE) are checked; then the connection is reset, as the rest of the body
 * is not what is measured. A small receive buffer keeps what the server sends for nothing small.
 *
 * Prints one line of JSON: how many downloads were begun, p50, p99 and the longest wait in milliseconds, the first error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char failure[200];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what, const char *detail) {
    snprintf(failure, sizeof failure, "%s: %.120s", what, detail);
    for (char *p = failure; *p; p++) if (*p < 32 || *p == '"' || *p == '\\') *p = ' ';
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds until the first byte of the body. */
static double once(const struct sockaddr_in *to, const char *request, int length, long long size) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1, room = 16 << 10, used = 0;
    struct timeval patience = {.tv_sec = 20};
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    char head[8192];
    double began = now(), waited = 0;
    if (connect(fd, (const void *)to, sizeof *to)) fail("connect", strerror(errno));
    else if (send(fd, request, length, MSG_NOSIGNAL) != length) fail("send", strerror(errno));
    while (!failure[0] && !waited) {
        ssize_t r = recv(fd, head + used, sizeof head - 1 - used, 0);
        if (r <= 0) { fail("closed in head", r ? strerror(errno) : "end"); break; }
        used += r;
        head[used] = 0;
        char *blank = strstr(head, "\r\n\r\n"), *field;
        if (!blank) {
            if (used == sizeof head - 1) fail("head", "too long");
            continue;
        }
        if (blank + 4 == head + used) {
            /* The head came alone; the body's first byte is still to come. */
            if (used == sizeof head - 1) fail("head", "too long");
            continue;
        }
        waited = now() - began;
        *blank = 0;
        field = strcasestr(head, "\r\ncontent-length:");
        if (atoi(head + 9) != 200) fail("status", head);
        else if (!field || atoll(field + 17) != size) fail("content-length", field ? field + 2 : head);
    }
    close(fd);
    return waited;
}

int main(int argc, char **argv) {
    if (argc < 7) return 2;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    char request[4096];
    int length = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s\r\n", argv[3], argv[1]);
    for (int i = 7; i < argc; i++) length += snprintf(request + length, sizeof request - length, "%s\r\n", argv[i]);
    length += snprintf(request + length, sizeof request - length, "\r\n");
    size_t count = 0, room = 1024;
    double *waits = malloc(room * sizeof *waits), end = now() + atof(argv[5]);
    while (now() < end && !failure[0]) {
        if (count == room) waits = realloc(waits, (room *= 2) * sizeof *waits);
        waits[count++] = once(&to, request, length, atoll(argv[4]));
        usleep(atoi(argv[6]) * 1000);
    }
    qsort(waits, count, sizeof *waits, ascending);
    printf("{\"downloads\": %zu, \"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f, \"error\": \"%s\"}\n", count,
           waits[count / 2] * 1e3, waits[count * 99 / 100] * 1e3, waits[count - 1] * 1e3, failure);
    return failure[0] != 0;
}
