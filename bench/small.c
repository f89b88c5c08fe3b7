/* Small requests, one after the other on each of some keep-alive connections, as fast as the answers come.
 *
 *   small HOST PORT PATH CONNECTIONS SECONDS
 *
 * One thread, epoll. Every answer must be a 200 with a Content-Length and exactly so many bytes. The first tenth of
 * SECONDS warms up and does not count. Prints one line of JSON: answers, seconds, quantiles of the latency in
 * milliseconds, and the first error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct conn {
    int fd, used;
    double asked;
    char in[8192];
};

static char request[512], failure[160];
static int request_length;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what, const char *detail) {
    if (failure[0]) return;
    snprintf(failure, sizeof failure, "%s: %.100s", what, detail);
    for (char *p = failure; *p; p++) if (*p < 32 || *p == '"' || *p == '\\') *p = ' ';
}

static void ask(struct conn *c) {
    c->used = 0;
    c->asked = now();
    if (send(c->fd, request, request_length, MSG_NOSIGNAL) != request_length) fail("send", strerror(errno));
}

/* Whether the answer is complete. */
static int answered(struct conn *c) {
    c->in[c->used] = 0;
    char *blank = strstr(c->in, "\r\n\r\n"), *length = strcasestr(c->in, "\r\ncontent-length:");
    if (!blank) return 0;
    if (strncmp(c->in, "HTTP/1.1 200", 12) || !length || length > blank) { fail("answer", c->in); return 0; }
    int size = (int)(blank + 4 - c->in) + atoi(length + 17);
    if (c->used > size) fail("answer", "longer than its Content-Length");
    return c->used == size;
}

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    int connections = atoi(argv[4]), one = 1, ep = epoll_create1(0);
    double seconds = atof(argv[5]);
    request_length = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", argv[3], argv[1]);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    struct conn *conns = calloc(connections, sizeof *conns);
    for (int i = 0; i < connections; i++) {
        struct conn *c = &conns[i];
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->fd, (void *)&to, sizeof to)) { perror("connect"); return 1; }
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
        ask(c);
    }
    size_t count = 0, room = 1 << 20;
    float *latencies = malloc(room * sizeof *latencies);
    double start = now(), begun = 0, end;
    while ((end = now()) < start + seconds * 1.1 && !failure[0]) {
        if (!begun && end > start + seconds * 0.1) begun = end;
        struct epoll_event ready[256];
        int n = epoll_wait(ep, ready, 256, 100);
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            ssize_t r = recv(c->fd, c->in + c->used, sizeof c->in - 1 - c->used, 0);
            if (r <= 0) { fail("closed", r ? strerror(errno) : "end"); continue; }
            c->used += r;
            if (!answered(c)) continue;
            if (begun) {
                if (count == room) latencies = realloc(latencies, (room *= 2) * sizeof *latencies);
                latencies[count++] = (now() - c->asked) * 1e3;
            }
            ask(c);
        }
    }
    qsort(latencies, count, sizeof *latencies, by_size);
    float p50 = count ? latencies[count / 2] : 0, p99 = count ? latencies[count * 99 / 100] : 0;
    printf("{\"answers\": %zu, \"seconds\": %.6f, \"p50\": %.4f, \"p99\": %.4f, \"max\": %.4f, \"error\": \"%s\"}\n", count,
           end - begun, p50, p99, count ? latencies[count - 1] : 0, failure);
    return failure[0] != 0;
}
