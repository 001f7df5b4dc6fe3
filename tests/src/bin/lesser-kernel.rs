//! A program on a kernel that lacks something.
//!
//! `lesser-kernel CALL PROGRAM [ARGUMENT]...` becomes PROGRAM, to which and to
//! whose children the kernel says that it knows no system call CALL: `bpf`,
//! `clone3` or `userfaultfd`. What it says elsewhere, in files and caches, stays.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::{env, io};

fn main() -> io::Result<()> {
    let mut arguments = env::args_os().skip(1);
    let (Some(call), Some(program)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other(
            "usage: lesser-kernel CALL PROGRAM [ARGUMENT]...",
        ));
    };
    let number = match call.to_str() {
        Some("bpf") => libc::SYS_bpf,
        Some("clone3") => libc::SYS_clone3,
        Some("userfaultfd") => libc::SYS_userfaultfd,
        _ => return Err(io::Error::other(format!("no such call here: {call:?}"))),
    };
    forget(u32::try_from(number).map_err(io::Error::other)?)?;
    Err(Command::new(program).args(arguments).exec())
}

/// Has the kernel refuse a system call as one that it does not know.
fn forget(number: u32) -> io::Result<()> {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, number),
        step(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(libc::BPF_RET, 0, 0, unknown),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(steps.len()).unwrap_or(0),
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: a program of that length, which the kernel copies. Root needs no
    // promise about new rights.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
