//! Programs to which the kernel does not give every system call.

use std::io;

/// From here on the kernel answers these calls of this process, and of what it
/// starts, with `action` (`SECCOMP_RET_*`), and does all others. The caller is root,
/// or has promised to want no new rights.
///
/// # Errors
///
/// The kernel refuses the filter.
pub fn filter(calls: &[libc::c_long], action: u32) -> io::Result<()> {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let mut steps = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (place, call) in calls.iter().enumerate() {
        let number = u32::try_from(*call).map_err(io::Error::other)?;
        // Over the calls that follow, and what allows, to the last step.
        let on = u8::try_from(calls.len() - place).map_err(io::Error::other)?;
        let equals = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        steps.push(step(equals, on, 0, number));
    }
    steps.push(step(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW));
    steps.push(step(libc::BPF_RET, 0, 0, action));
    let program = libc::sock_fprog {
        len: u16::try_from(steps.len()).map_err(io::Error::other)?,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: a program of that length, which the kernel copies.
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
