//! The functions of the C library that are used here, and system calls.

use core::ffi::{c_char, c_int};

unsafe extern "C" {
    pub(crate) fn getenv(name: *const c_char) -> *const c_char;
    pub(crate) fn unsetenv(name: *const c_char) -> c_int;
    /// Where `errno` is; glibc and musl agree on the name.
    pub(crate) fn __errno_location() -> *mut c_int;
}

/// Numbers of system calls (`asm/unistd.h`).
#[cfg(target_arch = "x86_64")]
pub(crate) mod number {
    pub(crate) const READ: isize = 0;
    pub(crate) const WRITE: isize = 1;
    pub(crate) const CLOSE: isize = 3;
    pub(crate) const FSTAT: isize = 5;
    pub(crate) const LSEEK: isize = 8;
    pub(crate) const MMAP: isize = 9;
    pub(crate) const MUNMAP: isize = 11;
    pub(crate) const IOCTL: isize = 16;
    pub(crate) const PREAD64: isize = 17;
    pub(crate) const PWRITE64: isize = 18;
    pub(crate) const SETITIMER: isize = 38;
    pub(crate) const FCNTL: isize = 72;
    pub(crate) const EXIT_GROUP: isize = 231;
    pub(crate) const OPENAT: isize = 257;
    pub(crate) const NEWFSTATAT: isize = 262;
    pub(crate) const UNLINKAT: isize = 263;
    pub(crate) const READLINKAT: isize = 267;
    pub(crate) const PPOLL: isize = 271;
    pub(crate) const KCMP: isize = 312;
    pub(crate) const RENAMEAT2: isize = 316;
    pub(crate) const MEMFD_CREATE: isize = 319;
    pub(crate) const BPF: isize = 321;
    pub(crate) const USERFAULTFD: isize = 323;
}

/// Numbers of system calls (`asm-generic/unistd.h`).
#[cfg(target_arch = "aarch64")]
pub(crate) mod number {
    pub(crate) const FCNTL: isize = 25;
    pub(crate) const IOCTL: isize = 29;
    pub(crate) const UNLINKAT: isize = 35;
    pub(crate) const OPENAT: isize = 56;
    pub(crate) const CLOSE: isize = 57;
    pub(crate) const LSEEK: isize = 62;
    pub(crate) const READ: isize = 63;
    pub(crate) const WRITE: isize = 64;
    pub(crate) const PREAD64: isize = 67;
    pub(crate) const PWRITE64: isize = 68;
    pub(crate) const PPOLL: isize = 73;
    pub(crate) const READLINKAT: isize = 78;
    pub(crate) const NEWFSTATAT: isize = 79;
    pub(crate) const FSTAT: isize = 80;
    pub(crate) const EXIT_GROUP: isize = 94;
    pub(crate) const SETITIMER: isize = 103;
    pub(crate) const MUNMAP: isize = 215;
    pub(crate) const MMAP: isize = 222;
    pub(crate) const KCMP: isize = 272;
    pub(crate) const RENAMEAT2: isize = 276;
    pub(crate) const MEMFD_CREATE: isize = 279;
    pub(crate) const BPF: isize = 280;
    pub(crate) const USERFAULTFD: isize = 282;
}

/// Where `struct stat` has the mode and the device number (`asm/stat.h`).
#[cfg(target_arch = "x86_64")]
pub(crate) const STAT_MODE_AT: usize = 24;
#[cfg(target_arch = "x86_64")]
pub(crate) const STAT_RDEV_AT: usize = 40;
#[cfg(target_arch = "aarch64")]
pub(crate) const STAT_MODE_AT: usize = 16;
#[cfg(target_arch = "aarch64")]
pub(crate) const STAT_RDEV_AT: usize = 32;

/// A path is taken relative to the working directory.
pub(crate) const AT_FDCWD: isize = -100;

/// Makes a system call; `errno` is set when it returns -1.
///
/// # Safety
///
/// As for the call itself.
pub(crate) unsafe fn call(number: isize, arguments: [isize; 6]) -> isize {
    /// `MAX_ERRNO` of `linux/err.h`.
    const ERRORS: isize = 4095;
    // SAFETY: the caller's promise; superfluous arguments are ignored. `errno` belongs to
    // this thread.
    unsafe {
        let result = kernel(number, arguments);
        if (-ERRORS..0).contains(&result) {
            *__errno_location() = c_int::try_from(-result).unwrap_or(0);
            return -1;
        }
        result
    }
}

/// The C library's `syscall` is what CRIU is to find ours in place of, so it is made here.
///
/// # Safety
///
/// As for the call itself.
#[cfg(target_arch = "x86_64")]
unsafe fn kernel(number: isize, arguments: [isize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the registers are those of the kernel's convention
    // (`arch/x86/entry/entry_64.S`), which changes two more.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// The C library's `syscall` is what CRIU is to find ours in place of, so it is made here.
///
/// # Safety
///
/// As for the call itself.
#[cfg(target_arch = "aarch64")]
unsafe fn kernel(number: isize, arguments: [isize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the registers are those of the kernel's convention
    // (`arch/arm64/kernel/entry.S`).
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a => result,
            in("x1") b,
            in("x2") c,
            in("x3") d,
            in("x4") e,
            in("x5") f,
            options(nostack),
        );
    }
    result
}

/// A pointer as an argument of a system call.
pub(crate) fn address<T>(pointer: *const T) -> isize {
    pointer.expose_provenance().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_c_library() {
        for (ours, theirs) in [
            (number::READ, libc::SYS_read),
            (number::WRITE, libc::SYS_write),
            (number::CLOSE, libc::SYS_close),
            (number::FSTAT, libc::SYS_fstat),
            (number::LSEEK, libc::SYS_lseek),
            (number::MMAP, libc::SYS_mmap),
            (number::MUNMAP, libc::SYS_munmap),
            (number::IOCTL, libc::SYS_ioctl),
            (number::PREAD64, libc::SYS_pread64),
            (number::PWRITE64, libc::SYS_pwrite64),
            (number::SETITIMER, libc::SYS_setitimer),
            (number::FCNTL, libc::SYS_fcntl),
            (number::EXIT_GROUP, libc::SYS_exit_group),
            (number::OPENAT, libc::SYS_openat),
            (number::NEWFSTATAT, libc::SYS_newfstatat),
            (number::KCMP, libc::SYS_kcmp),
            (number::UNLINKAT, libc::SYS_unlinkat),
            (number::READLINKAT, libc::SYS_readlinkat),
            (number::PPOLL, libc::SYS_ppoll),
            (number::RENAMEAT2, libc::SYS_renameat2),
            (number::MEMFD_CREATE, libc::SYS_memfd_create),
            (number::BPF, libc::SYS_bpf),
            (number::USERFAULTFD, libc::SYS_userfaultfd),
        ] {
            assert_eq!(i64::try_from(ours).unwrap(), theirs);
        }
        assert_eq!(AT_FDCWD, isize::try_from(libc::AT_FDCWD).unwrap());
        assert_eq!(STAT_MODE_AT, core::mem::offset_of!(libc::stat, st_mode));
        assert_eq!(STAT_RDEV_AT, core::mem::offset_of!(libc::stat, st_rdev));
    }
}
