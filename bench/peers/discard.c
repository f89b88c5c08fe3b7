/* A client that downloads and throws away, as cheaply as the kernel lets it, so that the server is what is measured.
 *
 *   discard HOST PORT PATH SIZE CONNECTIONS SECONDS COPY RANGE [HEADER...]
 *
 * One thread, epoll, MSG_TRUNC receives (the kernel drops the bytes without copying them; COPY 1 copies them into a
 * buffer instead). Every connection asks for PATH, which has SIZE bytes, again and again; with RANGE > 0 for that many
 * bytes at a time, walking through the file. Each answer's status and Content-Length are checked, and that exactly so
 * many bytes follow. An @ in a HEADER stands for the number of the connection's miner; miners have, by turns, as many
 * connections as DISCARD_MINERS in the environment says (such as "1,16"; one by default). With DISCARD_FIELDS, a file,
 * each miner sends the header fields of its own line too, separated by tabs. Miners are read from by turns, one
 * connection each, as if each were a machine of its own: whoever has many connections is not read from more often.
 *
 * Prints one JSON line: bytes and seconds of the window after a warm-up, answers completed, the longest wait for a first
 * byte, over the miners the fewest and the most bytes and Jain's index, and the first error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct conn {
    int fd, set, in_body, head_len, miner;
    long long left, next, total;
    double asked;
    char head[4096];
};

static const char *path, *headers = "";
static char **fields; /* of each miner */
static char host[64];
static long long range_size, file_size, answers, counted;
static double first_byte_max;
static char failure[256];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what, const char *detail) {
    if (!failure[0]) snprintf(failure, sizeof failure, "%s %.120s", what, detail);
}

static void ask(struct conn *c) {
    char text[4096];
    int n = snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: %s\r\n", path, host);
    for (const char *h = headers; *h; h++) {
        if (*h == '@') n += snprintf(text + n, sizeof text - n, "%d", c->miner);
        else text[n++] = *h;
    }
    if (fields) n += snprintf(text + n, sizeof text - n, "%s\r\n", fields[c->miner]);
    if (range_size) {
        if (c->next + range_size > file_size) c->next = 0;
        n += snprintf(text + n, sizeof text - n, "Range: bytes=%lld-%lld\r\n", c->next, c->next + range_size - 1);
        c->next += range_size;
    }
    n += snprintf(text + n, sizeof text - n, "\r\n");
    c->in_body = 0;
    c->head_len = 0;
    c->asked = now();
    if (send(c->fd, text, n, MSG_NOSIGNAL) != n) fail("send", strerror(errno));
}

/* The head is complete at `end`: check it, and count what came after it as body. */
static void begin_body(struct conn *c, char *end) {
    *end = 0;
    double waited = now() - c->asked;
    if (waited > first_byte_max) first_byte_max = waited;
    int status = atoi(c->head + 9);
    if (status != (range_size ? 206 : 200)) fail("status", c->head);
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (!length) { fail("no content-length", c->head); return; }
    c->left = atoll(length + 17);
    if (c->left != (range_size ? range_size : file_size)) fail("content-length", length + 2);
    c->in_body = 1;
}

static void got(struct conn *c, long long n) {
    c->left -= n;
    c->total += n;
    counted += n;
    if (c->left < 0) fail("more bytes than Content-Length", "");
    if (c->left == 0) { answers++; ask(c); }
}

static void read_fields(const char *name, int miners) {
    FILE *file = fopen(name, "r");
    fields = calloc(miners, sizeof *fields);
    for (int i = 0; i < miners; i++) {
        char line[1024], *to = fields[i] = malloc(2 * sizeof line);
        if (!file || !fgets(line, sizeof line, file)) { fprintf(stderr, "%s has too few lines\n", name); exit(1); }
        for (char *c = line; *c && *c != '\n'; c++) {
            if (*c == '\t') *to++ = '\r', *to++ = '\n';
            else *to++ = *c;
        }
        *to = 0;
    }
    if (file) fclose(file);
}

int main(int argc, char **argv) {
    if (argc < 9) return 2;
    int connections = atoi(argv[5]), copy = atoi(argv[7]);
    double seconds = atof(argv[6]);
    file_size = atoll(argv[4]);
    range_size = atoll(argv[8]);
    path = argv[3];
    snprintf(host, sizeof host, "%s:%s", argv[1], argv[2]);
    char *all = calloc(1, 4096);
    for (int i = 9; i < argc; i++) { strcat(all, argv[i]); strcat(all, "\r\n"); }
    headers = all;
    size_t room = 4 << 20;
    char *buffer = malloc(room);
    struct conn *conns = calloc(connections, sizeof *conns), *sets = calloc(connections, sizeof *sets);
    const char *sizes = getenv("DISCARD_MINERS") ? getenv("DISCARD_MINERS") : "1", *size = sizes;
    int ep = epoll_create1(0), miners = 0;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    for (int i = 0; i < connections; miners++) {
        int own = atoi(size);
        if (own > 1) {
            /* A set of its own, which stands in the others' as one. */
            struct conn *set = &sets[miners];
            struct epoll_event e = {.events = EPOLLIN, .data.ptr = set};
            set->fd = epoll_create1(0);
            set->set = 1;
            epoll_ctl(ep, EPOLL_CTL_ADD, set->fd, &e);
        }
        for (int n = own; n-- && i < connections; i++) conns[i].miner = miners;
        size = strchr(size, ',') ? strchr(size, ',') + 1 : sizes;
    }
    if (getenv("DISCARD_FIELDS")) read_fields(getenv("DISCARD_FIELDS"), miners);
    for (int i = 0; i < connections; i++) {
        struct conn *c = &conns[i];
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->fd, (void *)&to, sizeof to)) { perror("connect"); return 1; }
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(sets[c->miner].set ? sets[c->miner].fd : ep, EPOLL_CTL_ADD, c->fd, &e);
        c->next = range_size * i % file_size;
    }
    for (int i = 0; i < connections; i++) ask(&conns[i]);
    double warm = seconds * 0.1, start = now(), begun = 0, end;
    while ((end = now()) < start + warm + seconds && !failure[0]) {
        if (!begun && end > start + warm) {
            begun = end;
            counted = 0;
            for (int i = 0; i < connections; i++) conns[i].total = 0;
        }
        struct epoll_event ready[256];
        int n = epoll_wait(ep, ready, 256, 100);
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->set) {
                struct epoll_event one;
                if (epoll_wait(c->fd, &one, 1, 0) < 1) continue;
                c = one.data.ptr;
            }
            if (!c->in_body) {
                int r = recv(c->fd, c->head + c->head_len, sizeof c->head - 1 - c->head_len, 0);
                if (r <= 0) { if (r == 0 || errno != EAGAIN) fail("closed in head", r ? strerror(errno) : "eof"); continue; }
                c->head_len += r;
                c->head[c->head_len] = 0;
                char *blank = strstr(c->head, "\r\n\r\n");
                if (!blank) { if (c->head_len > 4000) fail("head too long", c->head); continue; }
                int body = c->head_len - (int)(blank + 4 - c->head);
                begin_body(c, blank);
                if (body || c->left == 0) got(c, body);
                continue;
            }
            size_t want = c->left < (long long)room ? (size_t)c->left : room;
            ssize_t r = recv(c->fd, buffer, want, copy ? 0 : MSG_TRUNC);
            if (r > 0) got(c, r);
            else if (r == 0 || errno != EAGAIN) fail("closed in body", r ? strerror(errno) : "eof");
        }
    }
    long long *totals = calloc(miners, sizeof *totals), low, high;
    for (int i = 0; i < connections; i++) totals[conns[i].miner] += conns[i].total;
    double sum = 0, squares = 0;
    low = high = totals[0];
    for (int i = 0; i < miners; i++) {
        if (totals[i] < low) low = totals[i];
        if (totals[i] > high) high = totals[i];
        sum += totals[i];
        squares += (double)totals[i] * totals[i];
    }
    for (char *p = failure; *p; p++) if (*p < 32 || *p == '"' || *p == '\\') *p = ' ';
    printf("{\"bytes\": %lld, \"seconds\": %.6f, \"answers\": %lld, \"slowest\": %lld, \"fastest\": %lld, \"jain\": %.4f,"
           " \"first_byte_max\": %.6f, \"error\": \"%s\"}\n",
           counted, end - begun, answers, low, high, squares ? sum * sum / (miners * squares) : 0,
           first_byte_max, failure);
    return failure[0] != 0;
}
