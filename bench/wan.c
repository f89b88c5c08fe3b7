/* A wide-area link in user space, for kernels without netem: two TUN devices in two network namespaces.
 *
 *   wan NAMESPACE_A NAMESPACE_B DEVICE BITS_PER_SECOND ONE_WAY_MS LOSS QUEUE_MS SEED
 *
 * Each packet is lost with probability LOSS, waits for the link (a queue of QUEUE_MS, then tail drop), takes its
 * time at the link's rate, then ONE_WAY_MS more. Both directions alike. Prints "ready" once both devices are there; the
 * caller gives them addresses. Ends with its standard input.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define MTU 1500
#define SLOTS 65536 /* 1 Gbit/s for 0.5 s of full packets and more */

struct packet { uint64_t due; uint16_t length; uint8_t data[MTU + 36]; };
struct way { int in, out; struct packet *ring; uint32_t head, tail; uint64_t link_free; };

static void die(const char *what) { perror(what); exit(1); }

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int tun_in(const char *space, const char *device)
{
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", space);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET) != 0) die(path);
    close(ns);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("/dev/net/tun");
    struct ifreq request = {0};
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (ioctl(fd, TUNSETIFF, &request) != 0) die("TUNSETIFF");
    return fd;
}

static uint64_t random_state;
static double chance(void) /* xorshift64*: reproducible and cheap */
{
    random_state ^= random_state >> 12; random_state ^= random_state << 25; random_state ^= random_state >> 27;
    return (double)((random_state * 2685821657736338717ull) >> 11) / 9007199254740992.0;
}

int main(int argc, char **argv)
{
    if (argc != 9) { fprintf(stderr, "usage: see the source\n"); return 2; }
    double bits = atof(argv[4]), loss = atof(argv[6]);
    uint64_t delay = (uint64_t)(atof(argv[5]) * 1e6), queue = (uint64_t)(atof(argv[7]) * 1e6);
    random_state = strtoull(argv[8], NULL, 10) * 0x9E3779B97F4A7C15ull + 1;
    int a = tun_in(argv[1], argv[3]), b = tun_in(argv[2], argv[3]);
    struct way ways[2] = {{.in = a, .out = b}, {.in = b, .out = a}};
    for (int i = 0; i < 2; i++) if (!(ways[i].ring = malloc(SLOTS * sizeof(struct packet)))) die("malloc");
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        uint64_t now = now_ns(), next = now + 50000000u;
        for (int i = 0; i < 2; i++) {
            struct way *w = &ways[i];
            while (w->tail - w->head < SLOTS) {
                struct packet *p = &w->ring[w->tail % SLOTS];
                ssize_t n = read(w->in, p->data, sizeof p->data);
                if (n <= 0) break;
                if (w->link_free < now) w->link_free = now;
                if (chance() < loss || w->link_free - now > queue) continue;
                w->link_free += (uint64_t)((double)n * 8e9 / bits);
                p->length = (uint16_t)n;
                p->due = w->link_free + delay;
                w->tail++;
            }
            now = now_ns();
            while (w->head != w->tail && w->ring[w->head % SLOTS].due <= now) {
                struct packet *p = &w->ring[w->head % SLOTS];
                if (write(w->out, p->data, p->length) < 0 && errno == EAGAIN) break;
                w->head++;
            }
            if (w->head != w->tail && w->ring[w->head % SLOTS].due < next) next = w->ring[w->head % SLOTS].due;
        }
        struct pollfd files[3] = {{.fd = a, .events = POLLIN}, {.fd = b, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
        now = now_ns();
        /* Packets are let out in batches of 0.2 ms: far below the delay, and the processor can do something else. */
        uint64_t wait = next > now ? next - now : 0;
        if (wait < 200000) wait = 200000;
        struct timespec t = {.tv_sec = 0, .tv_nsec = (long)wait};
        nanosleep(&(struct timespec){0, 100000}, NULL);
        if (ppoll(files, 3, &t, NULL) < 0 && errno != EINTR) die("ppoll");
        if (files[2].revents) return 0;
    }
}
