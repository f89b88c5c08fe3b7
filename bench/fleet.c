/* A fleet of miners in one thread: each with its own token, its own connections and its own habits.
 *
 *   fleet HOST PORT PATH SECONDS LIMIT < MINERS
 *
 * Each line of standard input is a miner:
 *
 *   GROUP SIZE CONNECTIONS RANGE HABIT AT FILE TOKEN HOTKEY
 *
 * With SECONDS 0 every miner fetches the SIZE bytes of its slice once, all starting together, and the run ends when
 * each has them (or after LIMIT seconds). With SECONDS > 0 every connection asks again and again, and what counts are
 * the bytes that came between a tenth of SECONDS after the start and its end. RANGE > 0 asks for so many bytes at a
 * time; the miner's connections take the next range that none has asked for. HABIT `stall` stops reading at byte AT
 * and never closes; `drop` closes at byte AT and resumes a moment later by Range and If-Range; `plain` does neither.
 *
 * Bodies are dropped by the kernel (MSG_TRUNC) and counted; with a FILE other than `-` they are copied and compared,
 * byte by byte, with that file, which is the end of the body. Every status, Content-Length and Content-Range is
 * checked. One line of JSON is printed per miner: the second at which it had everything (0: never), bytes, seconds to
 * the first byte, times resumed, bytes compared, the first error. The last line is the whole
 * run, with the shares of the time in which the fleet waited for the server and in which it computed.
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
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum habit { PLAIN, STALL, DROP };
enum state { CLOSED, WAITING, CONNECTING, HEAD, BODY, STALLED };

#define PAUSE 0.05 /* seconds between a drop and the next try */

struct miner {
    int group, connections;
    long long size, range, at, next, bytes, counted, compared;
    enum habit habit;
    const char *file; /* mapped; NULL: do not compare */
    long long file_size;
    char token[256], hotkey[64], etag[80], error[200];
    double done, first_byte;
    int resumed, round, left; /* left: bytes that it may still take in this round */
};

struct conn {
    struct miner *miner;
    enum state state;
    int fd, head_len;
    long long from, position, stop; /* of the body: where this answer starts, is and ends */
    double again;
    char head[4096];
};

static struct sockaddr_in server;
static const char *path, *host;
static double start, seconds;
static int ep, unfinished, resuming, round_number;
static char *buffer;
#define ROOM (256 << 10)
/* Bytes that a miner may take in one round of all that have something to take: its own link, which its connections
 * share. One process that empties every socket it comes to would give a miner as much as its buffers hold. */


static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void finish(struct miner *m) {
    if (m->done) return;
    m->done = now() - start;
    unfinished--;
}

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->state = CLOSED;
}

static void fail(struct conn *c, const char *what, const char *detail) {
    struct miner *m = c->miner;
    if (!m->error[0]) {
        snprintf(m->error, sizeof m->error, "%s: %.120s", what, detail);
        for (char *p = m->error; *p; p++)
            if (*p < 32 || *p == '"' || *p == '\\') *p = ' ';
    }
    hang_up(c);
    finish(m);
}

static void dial(struct conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) { fail(c, "socket", strerror(errno)); return; }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (void *)&server, sizeof server) && errno != EINPROGRESS) {
        fail(c, "connect", strerror(errno));
        return;
    }
    c->state = CONNECTING;
    struct epoll_event e = {.events = EPOLLOUT, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
}

/* Ask for what comes next, or close when the miner has asked for everything. */
static void ask(struct conn *c) {
    struct miner *m = c->miner;
    if (m->range) {
        if (m->next >= m->size) {
            if (!seconds) { hang_up(c); return; }
            m->next = 0;
        }
        c->from = m->next;
        c->stop = c->from + m->range < m->size ? c->from + m->range : m->size;
        m->next = c->stop;
    } else if (!m->resumed) {
        c->from = 0;
        c->stop = m->size;
    } else {
        c->from = c->position;
    }
    char text[1024];
    int n = snprintf(text, sizeof text,
                     "GET %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nX-Hotkey: %s\r\nX-Expert-Group: %d\r\n",
                     path, host, m->token, m->hotkey, m->group);
    if (c->from || c->stop != m->size)
        n += snprintf(text + n, sizeof text - n, "Range: bytes=%lld-%lld\r\n", c->from, c->stop - 1);
    if (m->etag[0]) n += snprintf(text + n, sizeof text - n, "If-Range: %s\r\n", m->etag);
    n += snprintf(text + n, sizeof text - n, "\r\n");
    c->position = c->from;
    c->state = HEAD;
    c->head_len = 0;
    if (send(c->fd, text, n, MSG_NOSIGNAL) != n) fail(c, "send", strerror(errno));
}

static char *field(struct conn *c, const char *name) {
    char *found = strcasestr(c->head, name);
    return found ? found + strlen(name) : NULL;
}

/* The head is complete. Returns 0 when it is not as it must be. */
static int check_head(struct conn *c) {
    struct miner *m = c->miner;
    int ranged = c->from || c->stop != m->size;
    if (atoi(c->head + 9) != (ranged ? 206 : 200)) { fail(c, "status", c->head); return 0; }
    char *length = field(c, "\r\ncontent-length:"), *etag = field(c, "\r\netag: "), *at;
    if (!length || atoll(length) != c->stop - c->from) { fail(c, "content-length", c->head); return 0; }
    if (ranged && (!(at = field(c, "\r\ncontent-range: bytes ")) || atoll(at) != c->from)) {
        fail(c, "content-range", c->head);
        return 0;
    }
    if (!etag || *etag != '"') { fail(c, "etag", c->head); return 0; }
    size_t n = strcspn(etag + 1, "\"") + 2;
    if (n >= sizeof m->etag) { fail(c, "etag", etag); return 0; }
    if (!m->etag[0]) memcpy(m->etag, etag, n);
    else if (strncmp(m->etag, etag, n)) { fail(c, "etag changed", etag); return 0; }
    if (!m->first_byte) m->first_byte = now() - start;
    c->state = BODY;
    return 1;
}

/* `n` bytes of the body came; they lie at `data` if they are to be compared. */
static void got(struct conn *c, long long n, const char *data) {
    struct miner *m = c->miner;
    if (m->file && data) {
        long long lead = m->size - m->file_size, skip = c->position < lead ? lead - c->position : 0;
        if (skip < n) {
            if (memcmp(data + skip, m->file + c->position + skip - lead, n - skip)) { fail(c, "bytes", "differ"); return; }
            m->compared += n - skip;
        }
    }
    c->position += n;
    m->bytes += n;
    m->counted += n;
    if (c->position > c->stop) { fail(c, "body", "longer than Content-Length"); return; }
    if (m->habit != PLAIN && !m->resumed && c->position >= m->at && c->position < c->stop) {
        if (m->habit == STALL) {
            epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, NULL);
            c->state = STALLED;
            if (!m->done) { m->done = -1; unfinished--; }
        } else {
            hang_up(c);
            c->state = WAITING;
            c->again = now() + PAUSE;
            m->resumed++;
            resuming++;
        }
        return;
    }
    if (c->position == c->stop) {
        if (seconds) { ask(c); return; }
        if (m->bytes == m->size) finish(m);
        if (m->range) ask(c);
        else hang_up(c);
    }
}

static void readable(struct conn *c) {
    struct miner *m = c->miner;
    if (c->state == HEAD) {
        int r = recv(c->fd, c->head + c->head_len, sizeof c->head - 1 - c->head_len, 0);
        if (r <= 0) { if (r == 0 || errno != EAGAIN) fail(c, "closed in head", r ? strerror(errno) : "end"); return; }
        c->head_len += r;
        c->head[c->head_len] = 0;
        char *blank = strstr(c->head, "\r\n\r\n");
        if (!blank) { if (c->head_len == sizeof c->head - 1) fail(c, "head", "too long"); return; }
        long long body = c->head + c->head_len - (blank + 4);
        *blank = 0;
        if (check_head(c) && body) got(c, body, blank + 4);
        return;
    }
    if (m->round != round_number) {
        m->round = round_number;
        m->left = ROOM;
    }
    if (!m->left) return;
    /* Stop where the habit says, not wherever a large receive happens to end. */
    long long until = m->habit != PLAIN && !m->resumed && c->position < m->at ? m->at : c->stop;
    size_t want = until - c->position < m->left ? (size_t)(until - c->position) : (size_t)m->left;
    ssize_t r = recv(c->fd, buffer, want, m->file ? 0 : MSG_TRUNC);
    if (r > 0) m->left -= r;
    if (r > 0) got(c, r, m->file ? buffer : NULL);
    else if (r == 0 || errno != EAGAIN) fail(c, "closed in body", r ? strerror(errno) : "end");
}

static int read_miner(struct miner *m) {
    char habit[16], file[1024];
    if (scanf("%d %lld %d %lld %15s %lld %1023s %255s %63s", &m->group, &m->size, &m->connections, &m->range, habit,
              &m->at, file, m->token, m->hotkey) != 9) return 0;
    m->habit = *habit == 's' ? STALL : *habit == 'd' ? DROP : PLAIN;
    if (strcmp(file, "-")) {
        struct stat st;
        int fd = open(file, O_RDONLY);
        if (fd < 0 || fstat(fd, &st)) { perror(file); exit(1); }
        m->file_size = st.st_size;
        m->file = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (m->file == MAP_FAILED) { perror(file); exit(1); }
        close(fd);
    }
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    host = argv[1];
    path = argv[3];
    seconds = atof(argv[4]);
    double limit = atof(argv[5]), end, began = 0, idle = 0;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, host, &server.sin_addr);
    buffer = malloc(ROOM);
    struct miner *miners = NULL;
    int count = 0, connections = 0;
    for (;;) {
        miners = realloc(miners, (count + 1) * sizeof *miners);
        memset(&miners[count], 0, sizeof *miners);
        if (!read_miner(&miners[count])) break;
        connections += miners[count++].connections;
    }
    ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event *ready = calloc(connections + 1, sizeof *ready); /* a round is everything that is ready */
    struct conn *conns = calloc(connections, sizeof *conns);
    unfinished = count;
    start = now();
    for (int i = 0, k = 0; i < count; i++)
        for (int j = 0; j < miners[i].connections; j++, k++) {
            conns[k].miner = &miners[i];
            dial(&conns[k]);
        }
    while ((end = now()) < start + (seconds ? seconds * 1.1 : limit) && unfinished) {
        if (seconds && !began && end > start + seconds * 0.1) {
            began = end;
            for (int i = 0; i < count; i++) miners[i].counted = 0;
        }
        double before = now();
        int n = epoll_wait(ep, ready, connections, resuming ? 5 : 50);
        idle += now() - before;
        round_number++;
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->state == CONNECTING) {
                int error = 0;
                socklen_t length = sizeof error;
                getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
                if (error) { fail(c, "connect", strerror(error)); continue; }
                struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
                epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
                ask(c);
            } else if (c->state == HEAD || c->state == BODY) {
                readable(c);
            }
        }
        if (resuming && (end = now()))
            for (int i = 0; i < connections; i++)
                if (conns[i].state == WAITING && conns[i].again <= end) { resuming--; dial(&conns[i]); }
    }
    long long bytes = 0;
    for (int i = 0; i < count; i++) {
        struct miner *m = &miners[i];
        bytes += m->counted;
        printf("{\"seconds\": %.6f, \"bytes\": %lld, \"first_byte\": %.6f, \"resumed\": %d, \"compared\": %lld, \"error\": \"%s\"}\n",
               m->done > 0 ? m->done : 0, m->counted, m->first_byte, m->resumed, m->compared, m->error);
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double busy = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
    printf("{\"seconds\": %.6f, \"bytes\": %lld, \"idle\": %.4f, \"busy\": %.4f}\n", end - (seconds ? began : start),
           bytes, idle / (end - start), busy / (end - start));
    return 0;
}
