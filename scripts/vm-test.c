/* Preloaded under User Mode Linux by scripts/vm-test: kernels before 6.13 know of too small a state
 * of the vector registers for CPUs with AMX, and the host refuses to set only a part. What they do
 * not know of stays as it is. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PEEK_TEXT = 1, PEEK_USER = 3, GET_REGISTERS = 0x4204, SET_REGISTERS = 0x4205 };

#define STATE ((void *)0x202) /* NT_X86_XSTATE */

static long set_state(pid_t pid, struct iovec *given)
{
    static char all[64 * 1024] __attribute__((aligned(64)));
    struct iovec whole = {all, sizeof all};

    if (syscall(SYS_ptrace, GET_REGISTERS, pid, STATE, &whole) != 0 ||
        whole.iov_len <= given->iov_len)
        return syscall(SYS_ptrace, SET_REGISTERS, pid, STATE, given);
    memcpy(all, given->iov_base, given->iov_len);
    return syscall(SYS_ptrace, SET_REGISTERS, pid, STATE, &whole);
}

long ptrace(int request, ...)
{
    va_list more;
    va_start(more, request);
    pid_t pid = va_arg(more, pid_t);
    void *address = va_arg(more, void *);
    void *data = va_arg(more, void *);
    va_end(more);

    if (request == SET_REGISTERS && address == STATE)
        return set_state(pid, data);
    if (request >= PEEK_TEXT && request <= PEEK_USER) {
        long word;
        if (syscall(SYS_ptrace, request, pid, address, &word) < 0)
            return -1;
        errno = 0;
        return word;
    }
    return syscall(SYS_ptrace, request, pid, address, data);
}
