//! A process's mappings, from `/proc/PID/maps`.

use std::fs;
use std::ops::Range;

use crate::PAGE;
use crate::error::MemoryError;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) range: Range<u64>,
    pub(crate) readable: bool,
    pub(crate) executable: bool,
    pub(crate) shared: bool,
    /// Major and minor number of the file system.
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) name: String,
}

impl Vma {
    pub(crate) fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Private anonymous memory that can be read.
    ///
    /// Not tracked, therefore dumped whole while the tree is frozen:
    ///  - memory that cannot be read: CRIU dumps it whole anyway;
    ///  - private mappings of files: when a page that was written to is dropped
    ///    (`MADV_DONTNEED`), the kernel keeps a mark in its place that looks like
    ///    a swapped page, and CRIU would ask for content long outdated. They are
    ///    small as a rule. Huge pages and AIO rings are of this kind, too;
    ///  - shared memory, which has no owner among the processes: see
    ///    [`crate::segments`].
    pub(crate) fn trackable(&self) -> bool {
        self.readable && self.anonymous()
    }

    /// Private anonymous memory. It may be tracked although it cannot be read
    /// just now: what it holds and its marks outlast a change of protection.
    pub(crate) fn anonymous(&self) -> bool {
        !self.shared
            && self.inode == 0
            && (self.name.is_empty()
                || self.name == "[heap]"
                || self.name.starts_with("[stack")
                || self.name.starts_with("[anon:"))
    }

    /// Shows a file that has a place elsewhere: huge pages are of files of the kernel's own.
    pub(crate) fn of_file(&self) -> bool {
        self.inode != 0 && !self.name.starts_with("/anon_hugepage")
    }

    /// Belongs to what CRIU dumps as private memory, tracked or not.
    pub(crate) fn private(&self) -> bool {
        !self.shared
            && !matches!(
                self.name.as_str(),
                "[vsyscall]" | "[vvar]" | "[vvar_vclock]"
            )
    }
}

/// Reads the mappings of a process; none when it has ended.
pub(crate) fn read(pid: i32) -> Result<Vec<Vma>, MemoryError> {
    let path = format!("/proc/{pid}/maps");
    // Not `read_to_string`: file names may be any bytes.
    let text = fs::read(&path).map_err(|source| proc_failed(pid, &path, source))?;
    String::from_utf8_lossy(&text)
        .lines()
        .map(|line| {
            parse(line).ok_or_else(|| MemoryError::Format {
                path: path.clone(),
                line: line.to_owned(),
            })
        })
        .collect()
}

/// A file of a process that has ended reads as "no such process".
pub(crate) fn proc_failed(pid: i32, path: &str, source: std::io::Error) -> MemoryError {
    if source.kind() == std::io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ESRCH) {
        MemoryError::Gone { pid }
    } else {
        MemoryError::Proc {
            path: path.to_owned(),
            source,
        }
    }
}

fn parse(line: &str) -> Option<Vma> {
    let mut rest = line;
    let mut field = || {
        let (field, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        field
    };
    let (start, end) = field().split_once('-')?;
    let [read, _, execute, share] = *field().as_bytes() else {
        return None;
    };
    let _offset = field();
    let (major, minor) = field().split_once(':')?;
    let device = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode = field().parse().ok()?;
    let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
    let whole = range.start < range.end
        && range.start.is_multiple_of(PAGE)
        && range.end.is_multiple_of(PAGE);
    whole.then(|| Vma {
        range,
        readable: read == b'r',
        executable: execute == b'x',
        shared: share == b's',
        device,
        inode,
        name: rest.trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_every_kind() {
        let heap = parse("5581a000-5583b000 rw-p 00000000 00:00 0                          [heap]")
            .unwrap();
        assert_eq!(heap.range, 0x5581_a000..0x5583_b000);
        assert_eq!(heap.bytes(), 0x21000);
        assert_eq!(heap.device, (0, 0));
        let file = parse("7000-8000 rw-s 00000000 fe:1a 7    /lib/x").unwrap();
        assert_eq!(file.device, (0xfe, 0x1a));
        assert!(heap.trackable());
        for (line, trackable) in [
            ("7f00-8000 rw-p 00000000 00:00 0", None),
            ("7000-8000 rw-p 00000000 00:00 0 ", Some(true)),
            ("7000-8000 r-xp 00000000 00:00 0 ", Some(true)),
            ("7000-8000 ---p 00000000 00:00 0 ", Some(false)),
            (
                "7000-8000 rw-p 00000000 00:00 0    [anon:gc heap]",
                Some(true),
            ),
            (
                "7000-8000 rw-s 00000000 00:01 7    /dev/zero (deleted)",
                Some(false),
            ),
            (
                "7000-8000 rw-p 00000000 fe:00 9    /lib/with space.so",
                Some(false),
            ),
            (
                "7000-8000 rw-p 00000000 00:10 9    /anon_hugepage (deleted)",
                Some(false),
            ),
            (
                "7000-8000 rw-p 00000000 00:10 9    /[aio] (deleted)",
                Some(false),
            ),
            ("7000-8000 r--p 00000000 00:00 0    [vvar]", Some(false)),
            ("7000-8000 r-xp 00000000 00:00 0    [vdso]", Some(false)),
        ] {
            assert_eq!(parse(line).map(|vma| vma.trackable()), trackable, "{line}");
        }
        assert_eq!(
            parse("7000-8000 rw-p 00000000 fe:00 9    /lib/with space.so")
                .unwrap()
                .name,
            "/lib/with space.so"
        );
    }

    #[test]
    fn this_process_is_read() {
        let own = read(std::process::id().cast_signed()).unwrap();
        assert!(own.iter().any(|vma| vma.name == "[vdso]" && vma.private()));
        assert!(own.windows(2).all(|w| w[0].range.end <= w[1].range.start));
    }

    proptest! {
        #[test]
        fn any_line_parses_or_not(line: String) {
            let _ = parse(&line);
        }
    }
}
