//! The texts of /proc, read without trusting them.
//!
//! Every function takes what the kernel wrote and gives back what it says, or
//! `None` where it says nothing that can be understood. None of them panics on
//! any input; the property tests at the end hold them to it.

use migrate_core::policy::Credentials;

/// The fields of `/proc/PID/stat` that matter here (`proc_pid_stat(5)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stat {
    pub pid: i32,
    pub name: String,
    pub state: char,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub terminal: i32,
    pub flags: u32,
    pub start_ticks: u64,
}

/// `PF_KTHREAD` of `include/linux/sched.h`.
const PF_KTHREAD: u32 = 0x0020_0000;

impl Stat {
    pub(crate) fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// Ended, but not yet collected by its parent.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// `comm` may hold any byte, parentheses, spaces and line ends included, so it
/// ends at the last closing parenthesis of the text.
pub(crate) fn stat(text: &str) -> Option<Stat> {
    let (pid, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    let terminal = fields.next()?.parse().ok()?;
    let _foreground = fields.next()?;
    let flags = fields.next()?.parse().ok()?;
    // `starttime` is field 22; `flags`, just taken, was field 9.
    let start_ticks = fields.nth(12)?.parse().ok()?;
    Some(Stat {
        pid: pid.parse().ok()?,
        name: name.to_owned(),
        state,
        parent,
        group,
        session,
        terminal,
        flags,
        start_ticks,
    })
}

/// Whom a process runs as, by its `/proc/PID/status`.
pub(crate) fn credentials(status: &str) -> Credentials {
    let has = |key| {
        value(status, key)
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .is_some_and(|mask| mask != 0)
    };
    let users = value(status, "Uid").unwrap_or_default();
    Credentials {
        users: users
            .split_whitespace()
            .filter_map(|user| user.parse().ok())
            .collect(),
        privileged: ["CapInh", "CapPrm", "CapEff"].into_iter().any(has),
    }
}

/// The value of `Key:` in a `/proc/PID/status` or `fdinfo` text.
pub(crate) fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name == key).then(|| value.trim())
    })
}

/// A value in kB, as `MemAvailable:  123 kB`, in bytes.
pub(crate) fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let number = value(text, key)?.split_ascii_whitespace().next()?;
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    pub writable: bool,
    pub shared: bool,
    pub inode: u64,
    /// As the kernel prints it, ` (deleted)` included.
    pub path: String,
}

pub(crate) fn mapping(line: &str) -> Option<Mapping> {
    // start-end perms offset dev inode [path, which may hold spaces]
    let mut rest = line;
    let mut next = || {
        let trimmed = rest.trim_start_matches(' ');
        let (field, tail) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = tail;
        (!field.is_empty()).then_some(field)
    };
    let (start, end) = next()?.split_once('-')?;
    let perms = next()?.as_bytes();
    let _offset = next()?;
    let _device = next()?;
    let inode = next()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        writable: perms.get(1) == Some(&b'w'),
        shared: perms.get(3) == Some(&b's'),
        inode,
        path: unescape(rest.trim_start_matches(' ')),
    })
}

/// `/proc/PID/maps` and mountinfo print a line end in a path as `\012`, and
/// mountinfo also space, tab and backslash.
pub(crate) fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 4);
        let code = match digits {
            Some(digits) if byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)) => {
                digits
                    .iter()
                    .try_fold(0_u8, |sum, d| sum.checked_mul(8)?.checked_add(d - b'0'))
            }
            _ => None,
        };
        match code {
            Some(code) => {
                out.push(code);
                at += 4;
            }
            None => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A mount, from `/proc/PID/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// What part of the file system is mounted here.
    pub root: String,
    pub point: String,
    pub fstype: String,
    pub super_options: String,
}

pub(crate) fn mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let mut back = back.split(' ');
    Some(Mount {
        root: unescape(front.next()?),
        point: unescape(front.next()?),
        fstype: back.next()?.to_owned(),
        super_options: back.nth(1).unwrap_or_default().to_owned(),
    })
}

/// One hierarchy of `/proc/PID/cgroup`: controllers (empty for v2) and path.
pub(crate) fn cgroup(line: &str) -> Option<(&str, &str)> {
    let mut fields = line.splitn(3, ':');
    let _id = fields.next()?;
    let controllers = fields.next()?;
    let path = fields.next()?;
    path.starts_with('/').then_some((controllers, path))
}

/// A link of `/proc/PID/fd` such as `socket:[123]`: the number within.
pub(crate) fn link_number(link: &str, kind: &str) -> Option<u64> {
    link.strip_prefix(kind)?
        .strip_prefix(":[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// The kind of an anonymous inode: `[eventpoll]` of `anon_inode:[eventpoll]`,
/// without the brackets that only some of them wear.
pub(crate) fn anonymous(link: &str) -> Option<&str> {
    let kind = link.strip_prefix("anon_inode:")?;
    Some(
        kind.strip_prefix('[')
            .and_then(|k| k.strip_suffix(']'))
            .unwrap_or(kind),
    )
}

/// One line of `/proc/net/unix`: inode, whether it is a connected stream, path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnixLine {
    pub inode: u64,
    pub stream: bool,
    pub connected: bool,
}

pub(crate) fn unix(line: &str) -> Option<UnixLine> {
    // Num RefCount Protocol Flags Type St Inode Path
    let mut fields = line.split_ascii_whitespace().skip(4);
    let kind = fields.next()?;
    let state = fields.next()?;
    Some(UnixLine {
        inode: fields.next()?.parse().ok()?,
        stream: kind == "0001",
        connected: state == "03",
    })
}

/// Bytes that can be read at an offset; a short answer means the end.
pub(crate) trait ReadAt {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<usize>;
}

impl ReadAt for std::fs::File {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, into, offset)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..))
            .unwrap_or_default();
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

/// Notes larger than this are not looked at; a build-id needs 36 bytes, and a
/// whole note segment of a Debian library a few hundred.
const NOTES_MAX_BYTES: usize = 64 * 1024;
/// No linker makes more program headers than this.
const PROGRAM_HEADERS_MAX: u16 = 512;

/// The GNU build-id of an ELF file of either width and byte order.
pub(crate) fn build_id(file: &(impl ReadAt + ?Sized)) -> Option<Vec<u8>> {
    let mut header = [0_u8; 64];
    let count = file.read_at(0, &mut header).ok()?;
    let header = header.get(..count)?;
    if header.get(..4)? != b"\x7fELF" {
        return None;
    }
    let wide = match header.get(4)? {
        1 => false,
        2 => true,
        _ => return None,
    };
    let order = match header.get(5)? {
        1 => Order::Little,
        2 => Order::Big,
        _ => return None,
    };
    let (offset, entry_size, entries) = if wide {
        (
            order.u64(header, 32)?,
            order.u16(header, 54)?,
            order.u16(header, 56)?,
        )
    } else {
        (
            u64::from(order.u32(header, 28)?),
            order.u16(header, 42)?,
            order.u16(header, 44)?,
        )
    };
    for index in 0..entries.min(PROGRAM_HEADERS_MAX) {
        let at = offset.checked_add(u64::from(index) * u64::from(entry_size))?;
        let mut entry = [0_u8; 56];
        let count = file.read_at(at, &mut entry).ok()?;
        let entry = entry.get(..count)?;
        // PT_NOTE
        if order.u32(entry, 0)? != 4 {
            continue;
        }
        let (start, size) = if wide {
            (order.u64(entry, 8)?, order.u64(entry, 32)?)
        } else {
            (
                u64::from(order.u32(entry, 4)?),
                u64::from(order.u32(entry, 16)?),
            )
        };
        let size = usize::try_from(size).ok()?.min(NOTES_MAX_BYTES);
        let mut notes = vec![0; size];
        let count = file.read_at(start, &mut notes).ok()?;
        notes.truncate(count);
        if let Some(id) = build_id_note(&notes, order) {
            return Some(id);
        }
    }
    None
}

/// The descriptor of the first note of type `NT_GNU_BUILD_ID` named `GNU`.
fn build_id_note(mut notes: &[u8], order: Order) -> Option<Vec<u8>> {
    loop {
        let name_size = usize::try_from(order.u32(notes, 0)?).ok()?;
        let size = usize::try_from(order.u32(notes, 4)?).ok()?;
        let kind = order.u32(notes, 8)?;
        let name_end = 12_usize.checked_add(name_size)?;
        let start = name_end.checked_next_multiple_of(4)?;
        let end = start.checked_add(size)?;
        if kind == 3 && notes.get(12..name_end)? == b"GNU\0" && size > 0 {
            return notes.get(start..end).map(<[u8]>::to_vec);
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

#[derive(Clone, Copy)]
enum Order {
    Little,
    Big,
}

impl Order {
    fn bytes<const N: usize>(self, from: &[u8], at: usize) -> Option<[u8; N]> {
        let mut bytes: [u8; N] = from.get(at..at.checked_add(N)?)?.try_into().ok()?;
        if matches!(self, Self::Big) {
            bytes.reverse();
        }
        Some(bytes)
    }

    fn u16(self, from: &[u8], at: usize) -> Option<u16> {
        self.bytes(from, at).map(u16::from_le_bytes)
    }

    fn u32(self, from: &[u8], at: usize) -> Option<u32> {
        self.bytes(from, at).map(u32::from_le_bytes)
    }

    fn u64(self, from: &[u8], at: usize) -> Option<u64> {
        self.bytes(from, at).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stat_text(name: &str) -> String {
        format!(
            "77 ({name}) S 5 6 7 34816 6 4194304 1 2 3 4 5 6 7 8 20 0 1 0 998877 1234 56 \
             18446744073709551615 1 1 0\n"
        )
    }

    #[test]
    fn a_comm_of_parentheses_and_spaces() {
        for name in ["sleep", "a) b (", ") S 1 1 1 ", "((", "))", "x\ny", ""] {
            let parsed = stat(&stat_text(name)).unwrap();
            assert_eq!(parsed.name, name);
            assert_eq!((parsed.pid, parsed.parent), (77, 5));
            assert_eq!((parsed.group, parsed.session), (6, 7));
            assert_eq!(parsed.start_ticks, 998_877);
            assert_eq!(parsed.terminal, 34816);
        }
    }

    #[test]
    fn own_stat_and_maps_parse() {
        let own = stat(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(u32::try_from(own.pid).unwrap(), std::process::id());
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            assert!(mapping(line).is_some(), "{line}");
        }
        for line in std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
        {
            assert!(mount(line).is_some(), "{line}");
        }
    }

    #[test]
    fn a_mapping_of_a_path_with_spaces() {
        let line =
            "7f00-7fff rw-s 00001000 08:01 42                         /a b/c\\012d (deleted)";
        let parsed = mapping(line).unwrap();
        assert_eq!(parsed.path, "/a b/c\nd (deleted)");
        assert_eq!(
            (parsed.start, parsed.end, parsed.inode),
            (0x7f00, 0x7fff, 42)
        );
        assert!(parsed.shared && parsed.writable);
        let anonymous = mapping("7f00-7fff r--p 00000000 00:00 0 ").unwrap();
        assert_eq!(anonymous.path, "");
        assert!(!anonymous.shared && !anonymous.writable);
    }

    #[test]
    fn links() {
        assert_eq!(link_number("socket:[12]", "socket"), Some(12));
        assert_eq!(link_number("pipe:[12]", "socket"), None);
        assert_eq!(anonymous("anon_inode:[io_uring]"), Some("io_uring"));
        assert_eq!(anonymous("anon_inode:inotify"), Some("inotify"));
        assert_eq!(anonymous("anon_inode:bpf-map"), Some("bpf-map"));
        assert_eq!(anonymous("/tmp/x"), None);
    }

    #[test]
    fn hierarchies() {
        assert_eq!(cgroup("0::/a/b:c"), Some(("", "/a/b:c")));
        assert_eq!(cgroup("9:name=systemd:/"), Some(("name=systemd", "/")));
        assert_eq!(cgroup("9:nonsense"), None);
    }

    /// An ELF file with two note segments, the second of which has the id.
    fn elf(wide: bool, big: bool, id: &[u8]) -> Vec<u8> {
        let n16 = |v: u16| {
            if big {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let n32 = |v: u32| {
            if big {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let n64 = |v: u64| {
            if big {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let note = |name: &[u8], kind: u32, data: &[u8]| {
            let mut out = Vec::new();
            out.extend(n32(u32::try_from(name.len()).unwrap()));
            out.extend(n32(u32::try_from(data.len()).unwrap()));
            out.extend(n32(kind));
            for part in [name, data] {
                out.extend(part);
                out.resize(out.len().next_multiple_of(4), 0);
            }
            out
        };
        let first = note(b"stapsdt\0", 3, b"12345");
        let second = [note(b"GNU\0", 1, b"abi!"), note(b"GNU\0", 3, id)].concat();
        let (header, entry) = if wide { (64_u16, 56_u16) } else { (52, 32) };
        let notes_at = u64::from(header) + 2 * u64::from(entry);
        let mut out = b"\x7fELF".to_vec();
        out.extend([if wide { 2 } else { 1 }, if big { 2 } else { 1 }]);
        out.resize(usize::from(header), 0);
        if wide {
            out[32..40].copy_from_slice(&n64(u64::from(header)));
            out[54..56].copy_from_slice(&n16(entry));
            out[56..58].copy_from_slice(&n16(2));
        } else {
            out[28..32].copy_from_slice(&n32(u32::from(header)));
            out[42..44].copy_from_slice(&n16(entry));
            out[44..46].copy_from_slice(&n16(2));
        }
        let mut at = notes_at;
        for segment in [&first, &second] {
            let size = u64::try_from(segment.len()).unwrap();
            let mut bytes = vec![0; usize::from(entry)];
            bytes[..4].copy_from_slice(&n32(4));
            if wide {
                bytes[8..16].copy_from_slice(&n64(at));
                bytes[32..40].copy_from_slice(&n64(size));
            } else {
                bytes[4..8].copy_from_slice(&n32(u32::try_from(at).unwrap()));
                bytes[16..20].copy_from_slice(&n32(u32::try_from(size).unwrap()));
            }
            out.extend(bytes);
            at += size;
        }
        out.extend(first);
        out.extend(second);
        out
    }

    #[test]
    fn build_ids_of_every_width_and_order_cut_anywhere() {
        let id = [0xab_u8; 20];
        for (wide, big) in [(true, false), (true, true), (false, false), (false, true)] {
            let whole = elf(wide, big, &id);
            assert_eq!(
                build_id(whole.as_slice()),
                Some(id.to_vec()),
                "{wide} {big}"
            );
            for cut in 0..whole.len() {
                assert_eq!(build_id(&whole[..cut]), None, "{wide} {big} {cut}");
            }
        }
    }

    #[test]
    fn own_program_has_the_build_id_the_linker_gave_or_none() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        if let Some(id) = build_id(&file) {
            assert!(id.len() >= 8, "{id:?}");
        }
    }

    proptest! {
        #[test]
        fn any_comm(name in "\\PC{0,15}") {
            let parsed = stat(&stat_text(&name)).unwrap();
            prop_assert_eq!(parsed.name, name);
            prop_assert_eq!(parsed.start_ticks, 998_877);
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,200}") {
            let _ = stat(&text);
            let _ = mapping(&text);
            let _ = mount(&text);
            let _ = cgroup(&text);
            let _ = unix(&text);
            let _ = unescape(&text);
            let _ = kilobytes(&text, "MemAvailable");
            let _ = anonymous(&text);
            let _ = link_number(&text, "pipe");
        }

        #[test]
        fn stat_cut_anywhere(cut in 0_usize..140) {
            let text = stat_text("a) b (");
            let _ = stat(text.get(..cut).unwrap_or(&text));
        }

        #[test]
        fn broken_elf_is_answered(
            wide: bool, big: bool, changes in prop::collection::vec((0_usize..400, any::<u8>()), 0..8)
        ) {
            let mut bytes = elf(wide, big, &[7; 20]);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            let _ = build_id(bytes.as_slice());
        }

        #[test]
        fn any_bytes_after_the_magic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
            let bytes = [b"\x7fELF".as_slice(), &tail].concat();
            let _ = build_id(bytes.as_slice());
        }
    }
}
