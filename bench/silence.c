/* A crowd of connections that ask for nothing: every other one sends a byte a second, the rest nothing at all.
 *
 *   silence HOST PORT CONNECTIONS
 *
 * Prints `open` when all are connected, goes on until its standard input ends, and then prints one line of JSON: how
 * many of them the server has closed by then, and after how many seconds, counted from `open`, it had closed the last.
 * A process of its own: ten thousand sends a second within a driver that measures would be measured too.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    signal(SIGPIPE, SIG_IGN);
    int count = atoi(argv[3]), ep = epoll_create1(EPOLL_CLOEXEC), closed = 0, at = 0, *fds = calloc(count, sizeof *fds);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    for (int i = 0; i < count; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fds[i] < 0 || connect(fds[i], (void *)&to, sizeof to)) { perror("connect"); return 1; }
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.u32 = i};
        epoll_ctl(ep, EPOLL_CTL_ADD, fds[i], &e);
    }
    printf("open\n");
    fflush(stdout);
    double began = now(), last = 0;
    struct pollfd waits[2] = {{.fd = 0, .events = POLLIN}, {.fd = ep, .events = POLLIN}};
    for (;;) {
        /* A hundredth of the crowd every 10 ms: a byte a second each, and never all in one instant. */
        poll(waits, 2, 10);
        char end;
        if (waits[0].revents && read(0, &end, 1) <= 0) break;
        for (int goal = (int)((now() - began) * count); at < goal; at++) {
            int fd = fds[at % count];
            if (at % 2 == 0 && fd >= 0 && send(fd, "G", 1, MSG_DONTWAIT) < 0) continue; /* seen below */
        }
        struct epoll_event ready[256];
        for (int n = epoll_wait(ep, ready, 256, 0), i = 0; i < n; i++) {
            int which = ready[i].data.u32;
            char answer[4096];
            ssize_t r;
            while ((r = recv(fds[which], answer, sizeof answer, 0)) > 0) {}
            if (r < 0 && !(ready[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))) continue;
            close(fds[which]);
            fds[which] = -1;
            closed++;
            last = now() - began;
        }
    }
    printf("{\"closed\": %d, \"last_s\": %.3f}\n", closed, last);
    return 0;
}
