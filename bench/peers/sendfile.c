/* The physical limit: one thread a connection, nothing but blocking sendfile.
 *
 *   sendfile FILE PORT
 *
 * Answers every GET with the file, or with one `Range: bytes=a-b` of it. It checks nothing else, keeps nobody from
 * anything and is no server; it shows what the kernel can do.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static int file;
static long long size;

static void *serve(void *arg) {
    int fd = (int)(long)arg, used = 0;
    char in[8192], out[512];
    for (;;) {
        int r = recv(fd, in + used, sizeof in - 1 - used, 0);
        if (r <= 0) break;
        used += r;
        in[used] = 0;
        char *end = strstr(in, "\r\n\r\n");
        if (!end) continue;
        long long from = 0, to = size - 1;
        char *range = strcasestr(in, "\r\nrange: bytes=");
        if (range && range < end) sscanf(range + 15, "%lld-%lld", &from, &to);
        if (to >= size) to = size - 1;
        int n = snprintf(out, sizeof out, "HTTP/1.1 %s\r\nContent-Length: %lld\r\nContent-Range: bytes %lld-%lld/%lld\r\n\r\n",
                         range ? "206 Partial Content" : "200 OK", to - from + 1, from, to, size);
        used -= (int)(end + 4 - in);
        memmove(in, end + 4, used);
        if (send(fd, out, n, MSG_MORE | MSG_NOSIGNAL) != n) break;
        off_t at = from;
        while (at <= to) if (sendfile(fd, file, &at, to + 1 - at) <= 0) goto done;
    }
done:
    close(fd);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    signal(SIGPIPE, SIG_IGN);
    struct stat st;
    file = open(argv[1], O_RDONLY);
    fstat(file, &st);
    size = st.st_size;
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, "127.0.0.1", &a.sin_addr);
    if (bind(s, (void *)&a, sizeof a) || listen(s, 4096)) { perror("bind"); return 1; }
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 64 << 10);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    for (;;) {
        int c = accept(s, 0, 0);
        if (c < 0) continue;
        setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        pthread_t t;
        if (pthread_create(&t, &attr, serve, (void *)(long)c)) close(c);
    }
}
