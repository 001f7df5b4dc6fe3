//! `/proc/PID/smaps` as far as CRIU reads it, made of `/proc/PID/maps` and the flags of
//! each mapping.
//!
//! CRIU reads the first line of each mapping, which is that of `maps`, and the line of
//! flags (`parse_smaps` of `criu/proc_parse.c`). Between them the kernel writes counts of
//! pages that nobody reads, for which it looks at every page.
//!
//! Items in, items out; where anything is not as it is known here there is no text, and
//! CRIU gets the kernel's.

/// Flags as the kernel keeps them (`include/linux/mm.h`) and as `smaps` writes them
/// (`show_smap_vma_flags` of `fs/proc/task_mmu.c`), as far as CRIU 4.2 reads them
/// (`__parse_vmflags` of `criu/proc_parse.c`).
pub const NAMES: [(u64, [u8; 2]); 14] = [
    (0x100, *b"gd"),
    (0x400, *b"pf"),
    (0x2000, *b"lo"),
    (0x4000, *b"io"),
    (0x8000, *b"sr"),
    (0x1_0000, *b"rr"),
    (0x2_0000, *b"dc"),
    (0x20_0000, *b"nr"),
    (0x40_0000, *b"ht"),
    (0x200_0000, *b"wf"),
    (0x400_0000, *b"dd"),
    (0x2000_0000, *b"hg"),
    (0x4000_0000, *b"nh"),
    (0x8000_0000, *b"mg"),
];

/// Flags whose meaning is known, those of [`NAMES`] and such as CRIU does not ask for:
/// all that Linux has had in the lower half since 5.15, and of the upper half protection
/// keys and what a userfaultfd and `mseal` put there. Not the bit that means one thing in
/// old kernels and another in new ones (0x800), nor shadow stacks and what may be dropped
/// (`ss`, `dp`), which CRIU reads and whose bits differ between architectures.
const KNOWN: u64 = 0xffff_f7ff | 0x1f << 32 | 1 << 38 | 1 << 42;

/// Where the kernel shows a mapping that no process has (`[vsyscall]`).
const NOBODYS: u64 = 0xffff_ffff_ff60_0000;

/// Something that comes bit by bit.
pub trait Source<T> {
    /// The next one.
    fn next(&mut self) -> Next<T>;
}

/// What a [`Source`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<T> {
    /// Another one.
    Item(T),
    /// That was all.
    End,
    /// It cannot be read.
    Broken,
}

/// Where text goes.
pub trait Sink {
    /// Takes a byte; `false`: it cannot.
    fn push(&mut self, byte: u8) -> bool;
}

/// A mapping's first address, the first one behind it, and its flags.
pub type Mapping = [u64; 3];

/// Whether a mapping that begins at `start` comes behind one that ends at `end`. One that
/// does not has come before: read once more at its end, an iterator over one task's
/// mappings begins anew (`task_vma_seq_get_next` of `kernel/bpf/task_iter.c`, seen with
/// Linux 6.18).
#[must_use]
pub const fn goes_on(end: u64, start: u64) -> bool {
    start >= end
}

/// Reads the addresses at the start of a line of `maps`, byte by byte.
#[derive(Debug, Default, Clone, Copy)]
pub struct Addresses {
    start: u64,
    end: u64,
    field: Field,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Field {
    #[default]
    None,
    Start,
    End,
    Rest,
    Wrong,
}

impl Addresses {
    /// Takes the line's next byte.
    pub fn feed(&mut self, byte: u8) {
        let digit = match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        self.field = match (self.field, digit, byte) {
            (Field::None | Field::Start, Some(digit), _) => {
                self.start = self.start << 4 | u64::from(digit);
                Field::Start
            }
            (Field::Start, None, b'-') => Field::End,
            (Field::End, Some(digit), _) => {
                self.end = self.end << 4 | u64::from(digit);
                Field::End
            }
            (Field::End, None, b' ') | (Field::Rest, ..) => Field::Rest,
            _ => Field::Wrong,
        };
    }

    /// Both, once the line has got past them; `None` for any other line.
    #[must_use]
    pub fn get(&self) -> Option<(u64, u64)> {
        (self.field == Field::Rest).then_some((self.start, self.end))
    }
}

/// Writes the text. `false`: the records are not those of `maps`, or have flags of unknown
/// meaning, or something cannot be read or written; the text is worth nothing then.
pub fn compose(
    maps: &mut impl Source<u8>,
    mappings: &mut impl Source<Mapping>,
    text: &mut impl Sink,
) -> bool {
    let mut line = Addresses::default();
    let mut last = 0;
    loop {
        let byte = match maps.next() {
            Next::Item(byte) => byte,
            Next::End => {
                return line.field == Field::None
                    && match mappings.next() {
                        Next::Item([start, ..]) => !goes_on(last, start),
                        Next::End => true,
                        Next::Broken => false,
                    };
            }
            Next::Broken => return false,
        };
        if !text.push(byte) {
            return false;
        }
        if byte != b'\n' {
            line.feed(byte);
            continue;
        }
        let Some((start, end)) = core::mem::take(&mut line).get() else {
            return false;
        };
        if start >= NOBODYS {
            continue;
        }
        match mappings.next() {
            Next::Item([first, behind, flags])
                if first == start && behind == end && flags & !KNOWN == 0 =>
            {
                if !write(flags, text) {
                    return false;
                }
                last = end;
            }
            _ => return false,
        }
    }
}

fn write(flags: u64, text: &mut impl Sink) -> bool {
    let names = NAMES.iter().filter(|(bit, _)| flags & bit != 0);
    let names = names.flat_map(|(_, [first, second])| [b' ', *first, *second]);
    let line = b"VmFlags:".iter().copied().chain(names);
    // A blank stands at the end of the kernel's line, too.
    line.chain(*b" \n").all(|byte| text.push(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::String;
    use std::vec::Vec;

    impl<T: Copy> Source<T> for core::slice::Iter<'_, T> {
        fn next(&mut self) -> Next<T> {
            Iterator::next(self).map_or(Next::End, |item| Next::Item(*item))
        }
    }

    impl Sink for Vec<u8> {
        fn push(&mut self, byte: u8) -> bool {
            Vec::push(self, byte);
            true
        }
    }

    fn composed(maps: &str, mappings: &[Mapping]) -> Option<String> {
        let mut text = Vec::new();
        compose(&mut maps.as_bytes().iter(), &mut mappings.iter(), &mut text)
            .then(|| String::from_utf8(text).unwrap())
    }

    const MAPS: &str = "\
00400000-00401000 r-xp 00000000 08:01 42  /bin/a b-c d\\012
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
";
    const CODE: Mapping = [0x40_0000, 0x40_1000, 0x75];
    const BEHIND: Mapping = [0x7ffd_0002_1000, 0x7ffd_0002_2000, 0];
    const STACK: Mapping = [0x7ffd_0000_0000, 0x7ffd_0002_1000, 0x2010_2173];

    #[test]
    fn lines_of_maps_get_their_flags() {
        assert_eq!(
            composed(MAPS, &[CODE, STACK]).unwrap(),
            "\
00400000-00401000 r-xp 00000000 08:01 42  /bin/a b-c d\\012
VmFlags: \n\
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
VmFlags: gd lo hg \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
"
        );
        assert_eq!(composed("", &[]).as_deref(), Some(""));
        // The iterator has begun anew.
        for again in [CODE, STACK] {
            assert!(composed(MAPS, &[CODE, STACK, again]).is_some());
        }
    }

    #[test]
    fn what_does_not_fit_gives_no_text() {
        let moved = [CODE[0], CODE[1] + 0x1000, CODE[2]];
        for mappings in [
            &[][..],
            &[CODE],
            &[CODE, STACK, BEHIND],
            &[STACK, CODE],
            &[moved, STACK],
        ] {
            assert_eq!(composed(MAPS, mappings), None, "{mappings:?}");
        }
        // A shadow stack, one that may be dropped, and two bits that are nobody's.
        for bit in [37, 40, 11, 63] {
            let odd = [CODE[0], CODE[1], CODE[2] | 1 << bit];
            assert_eq!(composed(MAPS, &[odd, STACK]), None, "{bit}");
        }
        for maps in [
            "\n",
            "x\n",
            "-\n",
            "400000\n",
            "400000-401000\n",
            "00400000-00401000 r-xp",
        ] {
            assert_eq!(composed(maps, &[CODE]), None, "{maps:?}");
        }
    }

    #[test]
    fn every_flag_has_one_name() {
        for (bit, name) in NAMES {
            assert_eq!(bit.count_ones(), 1);
            assert_ne!(bit & KNOWN, 0);
            assert_eq!(
                NAMES
                    .iter()
                    .filter(|other| other.1 == name || other.0 == bit)
                    .count(),
                1
            );
        }
    }
}
