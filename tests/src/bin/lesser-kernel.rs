//! A program on a kernel that lacks something.
//!
//! `lesser-kernel CALL PROGRAM [ARGUMENT]...` becomes PROGRAM, to which and to
//! whose children the kernel says that it knows no system call CALL: `bpf`,
//! `clone3` or `userfaultfd`. What it says elsewhere, in files and caches, stays.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::{env, io};

use migrate_tests::seccomp;

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
    // Root needs no promise about new rights.
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    seccomp::filter(&[number], unknown)?;
    Err(Command::new(program).args(arguments).exec())
}
