//! The functions of the C library that are used here, and system calls.

use core::ffi::{c_char, c_int};

unsafe extern "C" {
    /// Makes a system call and sets `errno` as every wrapper does. C says
    /// `long`, which is as wide here.
    fn syscall(number: isize, ...) -> isize;
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
    pub(crate) const SETITIMER: isize = 38;
    pub(crate) const FCNTL: isize = 72;
    pub(crate) const EXIT_GROUP: isize = 231;
    pub(crate) const OPENAT: isize = 257;
    pub(crate) const UNLINKAT: isize = 263;
    pub(crate) const READLINKAT: isize = 267;
    pub(crate) const PPOLL: isize = 271;
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
    pub(crate) const PPOLL: isize = 73;
    pub(crate) const READLINKAT: isize = 78;
    pub(crate) const FSTAT: isize = 80;
    pub(crate) const EXIT_GROUP: isize = 94;
    pub(crate) const SETITIMER: isize = 103;
    pub(crate) const MUNMAP: isize = 215;
    pub(crate) const MMAP: isize = 222;
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
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's promise; superfluous arguments are ignored.
    unsafe { syscall(number, a, b, c, d, e, f) }
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
            (number::SETITIMER, libc::SYS_setitimer),
            (number::FCNTL, libc::SYS_fcntl),
            (number::EXIT_GROUP, libc::SYS_exit_group),
            (number::OPENAT, libc::SYS_openat),
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
