//! Paths: CRIU's cache of probes, and what a descriptor is open on.
//!
//! Bytes in, bytes out, in buffers of the caller.

/// Where CRIU as root keeps what it knows of the kernel (`KERNDAT_CACHE_FILE`),
/// and the beginning of the name under which it writes it.
const CACHE: &[u8] = b"/run/criu.kdat";

/// Most bytes of a path to the other cache, without the zero at its end.
pub(crate) const PLACE_BYTES_MAX: usize = 240;

/// Room for a path to the other cache with what CRIU appends.
pub(crate) type PathBuffer = [u8; 256];

/// Room for `/proc/self/fd/N`.
pub(crate) type LinkBuffer = [u8; 32];

/// Makes the path that takes the place of `path`, with a zero at its end.
/// `None`: it is not CRIU's cache and stays as it is.
///
/// Without a `place`, or with one that is too long, the empty path comes out:
/// a file that does not exist and cannot be made.
pub(crate) fn redirect<'a>(
    path: &[u8],
    place: &[u8],
    buffer: &'a mut PathBuffer,
) -> Option<&'a [u8]> {
    let rest = path.strip_prefix(CACHE)?;
    let length = place.len() + rest.len();
    *buffer = [0; size_of::<PathBuffer>()];
    if !place.is_empty() && length < buffer.len() {
        for (to, from) in buffer.iter_mut().zip(place.iter().chain(rest)) {
            *to = *from;
        }
    }
    Some(buffer)
}

/// Room for the target of a link to some process's `pagemap`. Longer targets are
/// cut off, and are no pagemaps.
pub(crate) type TargetBuffer = [u8; 64];

/// Whether the target of a descriptor's link is some process's `pagemap`.
pub(crate) fn is_pagemap(target: &[u8]) -> bool {
    target.ends_with(b"/pagemap")
}

/// Writes the path of the `maps` beside a `pagemap` or `smaps`, with a zero at its end;
/// `None`: it is neither.
pub(crate) fn maps_beside<'a>(file: &[u8], buffer: &'a mut TargetBuffer) -> Option<&'a [u8]> {
    let process = file
        .strip_suffix(b"/pagemap")
        .or_else(|| file.strip_suffix(b"/smaps"))?;
    *buffer = [0; size_of::<TargetBuffer>()];
    let path = process.iter().chain(b"/maps");
    if process.len() + b"/maps".len() >= buffer.len() {
        return None;
    }
    for (to, from) in buffer.iter_mut().zip(path) {
        *to = *from;
    }
    Some(buffer)
}

/// Whether a path that CRIU opens may lead to a process's `file`.
pub(crate) fn may_be(path: &[u8], file: &[u8]) -> bool {
    path.strip_suffix(file)
        .is_some_and(|before| before.is_empty() || before.ends_with(b"/"))
}

/// The process whose `file` the target of a descriptor's link is.
pub(crate) fn process_of(target: &[u8], file: &[u8]) -> Option<u32> {
    let process = target.strip_suffix(file)?.strip_suffix(b"/")?;
    process.strip_prefix(b"/proc/")?;
    // Of a thread (`/proc/PID/task/TID`) it would be the same memory.
    u32::try_from(number_at_end(process)?).ok()
}

/// The device number to show for a file of this mode and device number: that of
/// `/dev/null` for `/dev/net/tun`, else its own.
pub(crate) fn device_to_show(mode: u32, device: u64) -> u64 {
    /// `S_IFMT`, `S_IFCHR` of `linux/stat.h`.
    const KIND: u32 = 0o170_000;
    const CHARACTER: u32 = 0o020_000;
    /// 10:200 and 1:3 (Documentation/admin-guide/devices.txt), as `stat(2)` packs them.
    const TUNNEL: u64 = 10 << 8 | 200;
    const NULL: u64 = 1 << 8 | 3;
    if mode & KIND == CHARACTER && device == TUNNEL {
        NULL
    } else {
        device
    }
}

/// Writes `/proc/self/fd/FD` with a zero at its end.
pub(crate) fn fd_link(fd: u32, buffer: &mut LinkBuffer) -> &[u8] {
    *buffer = [0; size_of::<LinkBuffer>()];
    let mut digits = [0; 10];
    let path = b"/proc/self/fd/".iter().chain(decimal(fd, &mut digits));
    for (to, from) in buffer.iter_mut().zip(path) {
        *to = *from;
    }
    buffer
}

/// Room for `/proc/PID/fdinfo/N`.
pub(crate) type ProcessBuffer = [u8; 48];

/// Writes `/proc/PROCESS`, what is in `kind`, and `FD`, with a zero at its end.
pub(crate) fn of_process<'a>(
    process: u32,
    kind: &[u8],
    fd: u32,
    buffer: &'a mut ProcessBuffer,
) -> &'a [u8] {
    *buffer = [0; size_of::<ProcessBuffer>()];
    let (mut first, mut second) = ([0; 10], [0; 10]);
    let path = b"/proc/".iter().chain(decimal(process, &mut first));
    let path = path.chain(kind).chain(decimal(fd, &mut second));
    for (to, from) in buffer.iter_mut().zip(path) {
        *to = *from;
    }
    buffer
}

/// The digits of a number.
fn decimal(number: u32, digits: &mut [u8; 10]) -> impl Iterator<Item = &u8> {
    let mut left = number;
    let mut count = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(left % 10).unwrap_or(0);
        left /= 10;
        count += 1;
        if left == 0 {
            break;
        }
    }
    digits.iter().skip(10 - count)
}

/// Reads the number at the end of a path such as `/proc/self/fd/7`.
pub(crate) fn number_at_end(path: &[u8]) -> Option<i32> {
    let mut number: i32 = 0;
    let mut digits = 0;
    for byte in path.rsplit(|byte| *byte == b'/').next()? {
        if !byte.is_ascii_digit() {
            return None;
        }
        number = number
            .checked_mul(10)?
            .checked_add(i32::from(byte - b'0'))?;
        digits += 1;
    }
    (digits > 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;
    use std::format;
    use std::string::{String, ToString as _};
    use std::vec;

    fn redirected(path: &str, place: &str) -> Option<String> {
        let mut buffer = [1; 256];
        let out = redirect(path.as_bytes(), place.as_bytes(), &mut buffer)?;
        Some(
            CStr::from_bytes_until_nul(out)
                .unwrap()
                .to_str()
                .unwrap()
                .to_string(),
        )
    }

    #[test]
    fn the_cache_and_nothing_else_is_moved() {
        for path in [
            "",
            "/run/criu",
            "/run/criu.kda",
            "run/criu.kdat",
            "/proc/self/maps",
        ] {
            assert_eq!(redirected(path, "/x/kdat"), None);
        }
        for (path, to) in [
            ("/run/criu.kdat", "/x/kdat"),
            ("/run/criu.kdat.tmp", "/x/kdat.tmp"),
        ] {
            assert_eq!(redirected(path, "/x/kdat").as_deref(), Some(to));
        }
    }

    #[test]
    fn without_a_place_there_is_no_cache() {
        for path in ["/run/criu.kdat", "/run/criu.kdat.tmp"] {
            assert_eq!(redirected(path, "").as_deref(), Some(""));
        }
        let longest = format!("/{}", "x".repeat(PLACE_BYTES_MAX - 1));
        assert!(
            redirected("/run/criu.kdat.tmp", &longest)
                .unwrap()
                .ends_with("x.tmp")
        );
        let long = "x".repeat(400);
        for (path, place) in [
            ("/run/criu.kdat", long.as_str()),
            (&format!("/run/criu.kdat{long}"), "/x"),
        ] {
            assert_eq!(redirected(path, place).as_deref(), Some(""));
        }
    }

    #[test]
    fn numbers_of_descriptors() {
        let mut buffer = [1; 32];
        for fd in [0, 7, 10, 1024, u32::MAX] {
            let link = CStr::from_bytes_until_nul(fd_link(fd, &mut buffer)).unwrap();
            assert_eq!(link.to_str().unwrap(), format!("/proc/self/fd/{fd}"));
            assert_eq!(number_at_end(link.to_bytes()), i32::try_from(fd).ok());
        }
        for bad in [
            "",
            "/proc/self/fd/",
            "/proc/self/fd/x",
            "/x.so",
            "99999999999",
        ] {
            assert_eq!(number_at_end(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn smaps_by_their_path_and_link() {
        for (path, may) in [
            ("smaps", true),
            ("/proc/7/smaps", true),
            ("xsmaps", false),
            ("smaps_rollup", false),
            ("", false),
        ] {
            assert_eq!(may_be(path.as_bytes(), b"smaps"), may, "{path}");
        }
        for (target, process) in [
            ("/proc/7/smaps", Some(7)),
            ("/proc/7/task/8/smaps", Some(8)),
            ("/proc/smaps", None),
            ("/images/7/smaps", None),
            ("/proc/self/smaps", None),
            ("smaps", None),
        ] {
            assert_eq!(process_of(target.as_bytes(), b"smaps"), process, "{target}");
        }
        let mut buffer: TargetBuffer = [1; 64];
        let maps = maps_beside(b"/proc/7/smaps", &mut buffer).unwrap();
        let maps = CStr::from_bytes_until_nul(maps).unwrap();
        assert_eq!(maps.to_bytes(), b"/proc/7/maps");
        assert_eq!(maps_beside(b"/proc/7/maps", &mut buffer), None);
    }

    #[test]
    fn pagemaps_by_their_link() {
        for (target, is) in [
            ("/proc/7/pagemap", true),
            ("/proc/7/task/8/pagemap", true),
            ("/7/pagemap", true),
            ("/images/pagemap-7.img", false),
            ("pagemap", false),
            ("", false),
        ] {
            assert_eq!(is_pagemap(target.as_bytes()), is, "{target}");
        }
        assert!(!is_pagemap(&vec![b'x'; 4096]));
    }
}
