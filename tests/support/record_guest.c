/* The only program of a small guest: numbered records on its disks, each told on the console once it is safe.
 *
 * It is the guest's first process, in a RAM disk of its own. /dev/vda is raw: record n is 4 KiB, made from n, in a place made from n, so that
 * all of them stay. /dev/vdb, where there is one, has ext4: every eighth record is a line of the file `log`, too. After each it reads an
 * earlier one back, past the guest's own cache. What it says, a line each:
 *
 *   GUEST ready        the disks are there, writing begins
 *   ack n              record n was written and fsync has returned
 *   log n              so was its line in the file
 *   GUEST wrong ...    a read did not give what was written, or a call failed; it stops then
 *   GUEST full         every place is taken
 *
 * `tests/support/record_guest.py` compiles it and judges what is on the disks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <linux/fs.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, LOG_EVERY = 8 };

static const char *const MODULES[] = {
    "drivers/virtio/virtio", "drivers/virtio/virtio_ring", "drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci", "drivers/block/virtio_blk",
};

static void say(const char *format, ...) {
    char line[200];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    if (write(1, line, (size_t)length) < 0) _exit(1);
}

static _Noreturn void stop(const char *what, uint64_t number) {
    say("GUEST wrong %s %llu: %s", what, (unsigned long long)number, strerror(errno));
    for (;;) pause();
}

/* splitmix64, as a function of a counter. */
static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void fill(uint64_t *block, uint64_t number) {
    block[0] = number;
    for (uint64_t at = 1; at < WORDS; at++) block[at] = mixed(number * WORDS + at);
}

/* A permutation, since the number of places is a power of two. */
static off_t place_of(uint64_t number, uint64_t places) { return (off_t)((number * 2654435761ull) % places) * BLOCK; }

static void load_modules(void) {
    struct utsname system;
    uname(&system);
    for (size_t at = 0; at < sizeof MODULES / sizeof *MODULES; at++) {
        char path[300];
        snprintf(path, sizeof path, "/lib/modules/%s/kernel/%s.ko", system.release, MODULES[at]);
        int file = open(path, O_RDONLY);
        if (file < 0) continue; /* built into this kernel */
        syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
}

static int open_disk(void) {
    for (int tries = 0; tries < 600; tries++) {
        int disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk >= 0) return disk;
        usleep(50000);
    }
    stop("open /dev/vda", 0);
}

int main(void) {
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) dup2(console, 1);
    load_modules();
    int disk = open_disk(), log = -1;
    uint64_t bytes = 0;
    if (ioctl(disk, BLKGETSIZE64, &bytes)) stop("size", 0);
    uint64_t places = 1;
    while (places * 2 <= bytes / BLOCK) places *= 2;
    mkdir("/data", 0755);
    if (!mount("/dev/vdb", "/data", "ext4", 0, "")) {
        log = open("/data/log", O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (log < 0 || fsync(log)) stop("open log", 0);
    } else if (errno != ENOENT) {
        stop("mount", 0);
    }
    uint64_t *block, *found;
    if (posix_memalign((void **)&block, BLOCK, BLOCK) || posix_memalign((void **)&found, BLOCK, BLOCK)) stop("memory", 0);
    say("GUEST ready");
    for (uint64_t number = 1; number < places; number++) {
        fill(block, number);
        if (pwrite(disk, block, BLOCK, place_of(number, places)) != BLOCK) stop("write", number);
        if (fsync(disk)) stop("fsync", number);
        say("ack %llu", (unsigned long long)number);
        if (log >= 0 && number % LOG_EVERY == 0) {
            char line[64];
            int length = snprintf(line, sizeof line, "%llu %016llx\n", (unsigned long long)number, (unsigned long long)mixed(number));
            if (write(log, line, (size_t)length) != length) stop("append", number);
            if (fdatasync(log)) stop("fdatasync", number);
            say("log %llu", (unsigned long long)number);
        }
        uint64_t earlier = 1 + mixed(number) % number;
        fill(block, earlier);
        memset(found, 0xee, BLOCK);
        if (pread(disk, found, BLOCK, place_of(earlier, places)) != BLOCK) stop("read", earlier);
        if (memcmp(block, found, BLOCK)) {
            errno = 0;
            stop("content of", earlier);
        }
    }
    say("GUEST full");
    for (;;) pause();
}
