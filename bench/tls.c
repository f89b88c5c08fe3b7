/* A client of HTTPS downloads that is cheaper than the server, so that the server is what is measured.
 *
 *   tls HOST PORT PATH SIZE CONNECTIONS SECONDS DECRYPT RANGE [HEADER...]
 *
 * One thread, epoll, TLS 1.3. Handshakes and heads of answers go through OpenSSL; every status and Content-Length is
 * checked. With DECRYPT 0 the body is not decrypted: its records are counted by their headers, which say their lengths
 * (RFC 8446 5.2: a record holds 17 bytes beside its content: the content's type and the tag; neither server pads), and
 * an answer must end with its Content-Length to the byte. The keys have then lost count of the records, so the next
 * download takes a new connection. With DECRYPT 1 OpenSSL decrypts everything, as a miner's client does, and
 * connections are used again. With RANGE > 0 every request is for so many bytes, walking through the file.
 *
 * Prints one line of JSON: bytes of content and seconds of the window after a warm-up of a tenth, answers completed, the
 * cipher, the first error. The certificate is not checked: that costs a client, not a server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEADER 5
#define OVERHEAD 17

struct conn {
    SSL *ssl;
    int fd, in_body, head_len, header_len;
    long long left, record, next; /* record: bytes of the current record that are still to come */
    unsigned char header[HEADER];
    char head[20000];
};

static SSL_CTX *context;
static struct sockaddr_in server;
static const char *path, *host, *fields;
static long long file_size, range_size, counted, answers;
static int ep, decrypt;
static char failure[256], cipher[64];
static unsigned char *buffer;
#define ROOM (256 << 10)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what, const char *detail) {
    if (!failure[0]) snprintf(failure, sizeof failure, "%s: %.160s", what, detail);
}

static void fail_tls(const char *what) {
    char text[160];
    ERR_error_string_n(ERR_get_error(), text, sizeof text);
    fail(what, text);
}

/* The socket blocks while the handshake and the request go out, which takes a fraction of a millisecond. */
static void ask(struct conn *c) {
    char text[4096];
    int n = snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: %s\r\n%s", path, host, fields);
    if (range_size) {
        if (c->next + range_size > file_size) c->next = 0;
        n += snprintf(text + n, sizeof text - n, "Range: bytes=%lld-%lld\r\n", c->next, c->next + range_size - 1);
        c->next += range_size;
    }
    n += snprintf(text + n, sizeof text - n, "\r\n");
    c->in_body = c->head_len = c->header_len = 0;
    c->record = 0;
    if (SSL_write(c->ssl, text, n) != n) fail_tls("write");
}

static void dial(struct conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (void *)&server, sizeof server)) { fail("connect", strerror(errno)); return; }
    c->ssl = SSL_new(context);
    SSL_set_fd(c->ssl, c->fd);
    if (SSL_connect(c->ssl) != 1) { fail_tls("handshake"); return; }
    snprintf(cipher, sizeof cipher, "%s", SSL_get_cipher(c->ssl));
    ask(c);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
}

static void got(struct conn *c, long long n) {
    c->left -= n;
    counted += n;
    if (c->left < 0) fail("body", "more bytes than Content-Length");
}

static void next(struct conn *c) {
    answers++;
    if (decrypt) {
        fcntl(c->fd, F_SETFL, 0);
        ask(c);
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        return;
    }
    if (c->record || c->header_len) fail("body", "ended within a record");
    SSL_free(c->ssl);
    close(c->fd);
    dial(c);
}

/* Count what lies in the records of `n` bytes at `data`. */
static void walk(struct conn *c, const unsigned char *data, ssize_t n) {
    while (n > 0 && !failure[0]) {
        if (!c->record) {
            c->header[c->header_len++] = *data++;
            n--;
            if (c->header_len < HEADER) continue;
            c->header_len = 0;
            c->record = c->header[3] << 8 | c->header[4];
            if (c->header[0] != 23 || c->record <= OVERHEAD) { fail("record", "is no application data"); return; }
            got(c, c->record - OVERHEAD);
            continue;
        }
        ssize_t take = n < c->record ? n : (ssize_t)c->record;
        c->record -= take;
        data += take;
        n -= take;
    }
}

static void read_head(struct conn *c) {
    int r = SSL_read(c->ssl, c->head + c->head_len, sizeof c->head - 1 - c->head_len);
    if (r <= 0) {
        if (SSL_get_error(c->ssl, r) != SSL_ERROR_WANT_READ) fail_tls("closed in head");
        return;
    }
    c->head_len += r;
    c->head[c->head_len] = 0;
    char *blank = strstr(c->head, "\r\n\r\n"), *length;
    if (!blank) { if (c->head_len > 16000) fail("head", "too long"); return; }
    long long body = c->head + c->head_len - (blank + 4);
    *blank = 0;
    long long expected = range_size ? range_size : file_size;
    if (atoi(c->head + 9) != (range_size ? 206 : 200)) { fail("status", c->head); return; }
    length = strcasestr(c->head, "\r\ncontent-length:");
    if (!length || atoll(length + 17) != expected) { fail("content-length", c->head); return; }
    c->left = expected;
    c->in_body = 1;
    got(c, body);
    /* What OpenSSL has already taken from the socket belongs to this record. */
    while (!failure[0] && c->left && SSL_pending(c->ssl) > 0) {
        if ((r = SSL_read(c->ssl, buffer, ROOM)) <= 0) fail_tls("record");
        else got(c, r);
    }
    if (!c->left) next(c);
}

static void read_body(struct conn *c) {
    if (decrypt) {
        /* A record at a time, and no more than a buffer's worth before others have their turn. */
        for (int taken = 0; taken < ROOM;) {
            int r = SSL_read(c->ssl, buffer, ROOM);
            if (r <= 0) {
                if (SSL_get_error(c->ssl, r) != SSL_ERROR_WANT_READ) fail_tls("closed in body");
                return;
            }
            taken += r;
            got(c, r);
            if (failure[0]) return;
            if (!c->left) { next(c); return; }
        }
        return;
    }
    ssize_t r = recv(c->fd, buffer, ROOM, 0);
    if (r > 0) {
        walk(c, buffer, r);
        if (!failure[0] && !c->left && !c->record) next(c);
    } else if (r == 0 || errno != EAGAIN) fail("closed in body", r ? strerror(errno) : "end");
}

int main(int argc, char **argv) {
    if (argc < 9) return 2;
    signal(SIGPIPE, SIG_IGN);
    int connections = atoi(argv[5]);
    double seconds = atof(argv[6]);
    host = argv[1];
    path = argv[3];
    file_size = atoll(argv[4]);
    decrypt = atoi(argv[7]);
    range_size = atoll(argv[8]);
    char *all = calloc(1, 4096);
    for (int i = 9; i < argc; i++) { strcat(all, argv[i]); strcat(all, "\r\n"); }
    fields = all;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, host, &server.sin_addr);
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context, "TLS_AES_256_GCM_SHA384"); /* one for all: OpenSSL's own first choice */
    buffer = malloc(ROOM);
    ep = epoll_create1(EPOLL_CLOEXEC);
    struct conn *conns = calloc(connections, sizeof *conns);
    for (int i = 0; i < connections && !failure[0]; i++) {
        conns[i].next = range_size * i % file_size;
        dial(&conns[i]);
    }
    double start = now(), begun = 0, end;
    while ((end = now()) < start + seconds * 1.1 && !failure[0]) {
        if (!begun && end > start + seconds * 0.1) {
            begun = end;
            counted = 0;
        }
        struct epoll_event ready[256];
        int n = epoll_wait(ep, ready, 256, 100);
        for (int i = 0; i < n && !failure[0]; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->in_body) read_body(c);
            else read_head(c);
        }
    }
    for (char *p = failure; *p; p++) if (*p < 32 || *p == '"' || *p == '\\') *p = ' ';
    printf("{\"bytes\": %lld, \"seconds\": %.6f, \"answers\": %lld, \"cipher\": \"%s\", \"error\": \"%s\"}\n", counted,
           end - begun, answers, cipher, failure);
    return failure[0] != 0;
}
