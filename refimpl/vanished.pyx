# cython: language_level=3
"""What happens when a page of a mapped file is touched that is no longer in the file: SIGBUS, handled in C.

The handler puts empty pages from there to the end of the mapping, remembers where, has the interpreter call
the handler that `signal.signal` knows as soon as it can, and returns: the instruction that failed is done
again and reads zeros. It uses mmap, which POSIX does not list as safe in handlers and which on the systems
that we know is a mere system call, and PyErr_SetInterruptEx, which is made for this. SIGBUS anywhere else
goes to whoever had it before. `refimpl.files.watched_mappings` is the other half.
"""

from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #include <signal.h>
    #include <stdint.h>
    #include <sys/mman.h>
    #include <unistd.h>

    #define RANGES 16384  /* mappings at a time; DeepSeek-V3 has 163 files */
    static struct { volatile uintptr_t start, end; } ranges[RANGES];
    static volatile uintptr_t lost;
    static uintptr_t page;
    static struct sigaction before;

    static void on_sigbus(int number, siginfo_t *info, void *context) {
        uintptr_t at = (uintptr_t) info->si_addr;
        for (int i = 0; i < RANGES; i++)
            if (ranges[i].start <= at && at < ranges[i].end) {
                uintptr_t from = at & ~(page - 1);
                void *put = mmap((void *) from, ranges[i].end - from, PROT_READ,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
                if (put == MAP_FAILED) break;
                lost = at;
                PyErr_SetInterruptEx(SIGBUS);
                return;
            }
        sigaction(SIGBUS, &before, NULL);  /* it fails again, and is theirs */
    }

    static void remember_sigbus(void) { sigaction(SIGBUS, NULL, &before); }
    static void take_sigbus(void) {
        struct sigaction ours = {0};
        page = (uintptr_t) sysconf(_SC_PAGESIZE);
        lost = 0;
        ours.sa_sigaction = on_sigbus;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
        sigemptyset(&ours.sa_mask);
        sigaction(SIGBUS, &ours, NULL);
    }
    static void give_sigbus_back(void) { sigaction(SIGBUS, &before, NULL); }

    static void add_range(uintptr_t start, uintptr_t size) {
        for (int i = 0; i < RANGES; i++)
            if (!ranges[i].end) { ranges[i].start = start; ranges[i].end = start + size; return; }
    }
    static void drop_range(uintptr_t start) {
        for (int i = 0; i < RANGES; i++)
            if (ranges[i].end && ranges[i].start == start) { ranges[i].end = 0; return; }
    }
    static uintptr_t lost_address(void) { return lost; }
    """
    void remember_sigbus()
    void take_sigbus()
    void give_sigbus_back()
    void add_range(uintptr_t start, uintptr_t size)
    void drop_range(uintptr_t start)
    uintptr_t lost_address()


def add(uintptr_t address, uintptr_t size):
    """A mapping of `size` bytes at `address`. Beyond 16,384 at a time they are not watched."""
    add_range(address, size)


def drop(uintptr_t address):
    """The mapping at `address` is no more."""
    drop_range(address)


def lost():
    """The address whose page was not there, the last one since `begin`; 0 for none."""
    return lost_address()


def begin(set_handler):
    """Take the signal. `set_handler()` sets Python's own handler, which this one has called."""
    remember_sigbus()
    set_handler()
    take_sigbus()


def end(reset_handler):
    """Give it back to whoever had it."""
    reset_handler()
    give_sigbus_back()
